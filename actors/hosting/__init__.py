"""Runs the code of an environment apart from the actor's loop, where it can harm neither the actor nor other tasks."""
