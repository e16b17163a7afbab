"""Where a step runs: strategies, devices, precision, and the host."""
