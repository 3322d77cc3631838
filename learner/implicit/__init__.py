"""The implicit reward model: a second policy that learns to tell good chains from bad ones, and pays single turns."""
