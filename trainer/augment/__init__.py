"""Discriminator augmentation: the pipeline of transformations and its controller."""
