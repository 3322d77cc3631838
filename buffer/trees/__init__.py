"""Trees in memory: put together from turns, where each stands, and what becomes of it."""
