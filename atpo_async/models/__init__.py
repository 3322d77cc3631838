"""Model folders: where they come from, what they hold, and how a run's policy becomes one."""
