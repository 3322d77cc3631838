"""Runs the code of an environment where it can harm neither the actor nor other tasks."""
