"""The parts of ``benchmarks/fleet_model.py``: a discrete-event model of a run, its parameters, what it is asked."""
