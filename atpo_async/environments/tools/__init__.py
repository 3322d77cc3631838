"""Tools: functions of a user that a policy calls, with their schemas, limits and answers."""
