"""Saving and resuming, averaged weights, checkpoints on the hub."""
