"""Runs a job on a Ray cluster: a supervisor that outlives its driver, and a host process for each role.

This is the only package that imports ray.
"""
