"""Losses: modules that turn a batch into the loss that is minimised; `flow.py` first.

The formula of the error is an objective in `latentflow.flow.objectives`; `flow_loss` in `average_velocity.py` chooses
the module that an objective needs.
"""
