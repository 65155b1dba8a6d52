"""Losses: modules that turn a batch into the loss that is minimised."""
