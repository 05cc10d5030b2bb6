"""Saving and resuming, EMA weights, checkpoints on the hub."""
