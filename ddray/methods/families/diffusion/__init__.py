"""A latent diffusion model: training, inversion, sampling."""
