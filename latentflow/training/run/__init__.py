"""The run of a generator, from the pictures to the pipeline: `train` in `train.py`, read from top to bottom."""
