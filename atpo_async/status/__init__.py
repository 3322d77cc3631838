"""The status of roles: their waits and progress, the status files, and the detection of hangs from them."""
