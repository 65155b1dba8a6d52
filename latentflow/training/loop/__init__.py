"""The loop of every training and what it needs: batches, optimisers, averages, checkpoints, what it says."""
