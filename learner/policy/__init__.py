"""The policy being trained: loading, precision, export."""
