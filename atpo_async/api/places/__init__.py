"""Where the roles of a run are: on this machine, or on a cluster."""
