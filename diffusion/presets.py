"""Diffusions by name."""

from diffusion.diffusion import Diffusion
from diffusion.edm import EDM
from diffusion.flow import FlowMatching
from diffusion.gaussian import GaussianDiffusion

DIFFUSIONS: dict[str, type[Diffusion]] = {
    "gaussian": GaussianDiffusion,
    "flow": FlowMatching,
    "edm": EDM,
}
