"""Diffusion processes, samplers and guidance; a model is any callable `(x_t, t, y)`."""

from diffusion.cascade import Cascade
from diffusion.edm import EDM
from diffusion.flow import FlowMatching
from diffusion.gaussian import GaussianDiffusion
from diffusion.guidance import Guidance
from diffusion.process import Prediction, Process
from diffusion.samplers import SAMPLERS, sample
from diffusion.spacings import SPACINGS

PROCESSES: dict[str, type[Process]] = {
    "gaussian": GaussianDiffusion,
    "flow": FlowMatching,
    "edm": EDM,
    "cascade": Cascade,
}

__all__ = [
    "EDM",
    "PROCESSES",
    "SAMPLERS",
    "SPACINGS",
    "Cascade",
    "FlowMatching",
    "GaussianDiffusion",
    "Guidance",
    "Prediction",
    "Process",
    "sample",
]
