"""Costs of a run: step, input and checkpoints timed here, TPU programs by their compiler."""
