"""The weights' benchmark in parts; ``benchmarks/weights.py`` is its command line."""
