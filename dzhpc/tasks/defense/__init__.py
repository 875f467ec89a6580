"""A denoiser before a classifier that may only be asked, and its certification."""
