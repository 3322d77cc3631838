"""Trees in memory: their assembly from turns, their state, and their life cycle."""
