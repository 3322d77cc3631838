"""The built-in metrics sinks, one module each: where a run's metrics go besides ``metrics.jsonl``.

A module's name is the sink's.  ``open_sink`` makes it; ``LIBRARY``, if it needs one, is looked for before a run begins.
"""
