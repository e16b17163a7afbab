"""StyleGAN2 (Karras et al. 2020), the networks of StyleGAN2-ADA."""
