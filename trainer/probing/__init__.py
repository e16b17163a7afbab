"""What a run will cost: the step, the input and checkpoints timed here, TPUs asked for by compiler."""
