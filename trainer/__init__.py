"""StyleGAN-family training on TensorFlow 2, for Google Cloud."""

__version__ = "0.1.0"
