"""The buffer: turns in, trees out, nothing acknowledged is lost."""
