"""Metrics sinks: where the metrics of a run go besides ``metrics.jsonl``, and the process that feeds them."""
