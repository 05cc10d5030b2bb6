"""Training and measuring autoencoders."""
