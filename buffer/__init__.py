"""The buffer: turns in, trees out; no acknowledged turn is lost."""
