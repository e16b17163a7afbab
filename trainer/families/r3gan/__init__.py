"""R3GAN (Huang et al. 2024, "The GAN is dead; long live the GAN! A modern GAN baseline")."""
