"""Diffusion processes, samplers and guidance; a model is any callable `(x_t, t, y)`."""

from diffusion.gaussian import GaussianDiffusion
from diffusion.samplers import SAMPLERS, sample

__all__ = ["SAMPLERS", "GaussianDiffusion", "sample"]
