"""A run as a job of a cluster: its supervisor, and the drivers that start it, attach to it and stop it."""
