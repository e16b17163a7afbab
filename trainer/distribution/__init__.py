"""Devices of a step: strategies, precision, and the host."""
