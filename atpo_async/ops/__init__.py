"""Starting, watching, restarting and ending the roles of a run."""
