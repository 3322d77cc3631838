"""Sections of single methods, off by default."""
