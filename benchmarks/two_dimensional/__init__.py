"""The parts of the 2-D transport benchmark (`benchmarks/transport_2d.py`)."""
