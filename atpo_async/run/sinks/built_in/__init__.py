"""The built-in metrics sinks, one module each: where a run's metrics go besides ``metrics.jsonl``."""
