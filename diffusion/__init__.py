"""Diffusion processes, samplers and guidance; a model is any callable `(x_t, t, y)`."""

from diffusion.gaussian import GaussianDiffusion
from diffusion.process import Prediction, Process
from diffusion.samplers import SAMPLERS, sample

PROCESSES = {"gaussian": GaussianDiffusion}

__all__ = ["PROCESSES", "SAMPLERS", "GaussianDiffusion", "Prediction", "Process", "sample"]
