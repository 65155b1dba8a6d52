"""The training loop: batches, steps, optimisers, averages, checkpoints, reports."""
