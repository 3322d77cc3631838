"""Running the roles of a run: starting, watching, restarting and stopping them, and the frame of a role's process."""
