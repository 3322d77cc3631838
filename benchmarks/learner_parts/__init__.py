"""The learner's benchmark in parts; ``benchmarks/learner.py`` is its command line."""
