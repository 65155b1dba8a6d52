"""The training loop: `fit.py` has the step, which loads, optimises, averages and saves with the files beside it."""
