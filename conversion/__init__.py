"""Weights of other codebases as ours, and ours as diffusers'."""
