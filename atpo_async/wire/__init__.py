"""Messages between roles: their types, their checks, and how they are encoded."""
