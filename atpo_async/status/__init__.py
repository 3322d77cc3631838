"""The status of roles: their waits and progress, the files that carry it, and what it says about hangs."""
