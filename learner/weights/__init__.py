"""Publishes the weights to the actors: versions, their files, their probe."""
