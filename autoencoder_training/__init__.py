"""Training of autoencoders, by scripts/train_autoencoder.py."""
