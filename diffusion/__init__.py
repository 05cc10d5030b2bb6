"""Diffusion diffusions, samplers and guidance; a model is any callable `(x_t, t, y)`."""

from diffusion.diffusion import Diffusion, Prediction
from diffusion.edm import EDM
from diffusion.flow import FlowMatching
from diffusion.gaussian import GaussianDiffusion
from diffusion.guidance import Guidance
from diffusion.samplers import SAMPLERS, sample
from diffusion.spacings import SPACINGS

DIFFUSIONS: dict[str, type[Diffusion]] = {
    "gaussian": GaussianDiffusion,
    "flow": FlowMatching,
    "edm": EDM,
}

__all__ = [
    "DIFFUSIONS",
    "EDM",
    "SAMPLERS",
    "SPACINGS",
    "Diffusion",
    "FlowMatching",
    "GaussianDiffusion",
    "Guidance",
    "Prediction",
    "sample",
]
