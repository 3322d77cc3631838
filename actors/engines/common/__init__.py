"""What the engines share: checks, admission, counters."""
