"""Vertex AI: its machines, its jobs, and the environment it gives to a run. Needs no TensorFlow."""
