"""What starts and ends the roles' processes: the protocol (``base``) and the built-in launchers."""
