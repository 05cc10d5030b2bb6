"""Diffusions, samplers and guidance; a model is any callable `(x_t, t, y, **extras)`.

The names in `__all__` are imported on first use, because command lines are built from `presets` and `options`, which
do not need torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusion.diffusion import Diffusion, Prediction
    from diffusion.options import SamplingOptions
    from diffusion.presets import DIFFUSIONS, EDM, FlowMatching, GaussianDiffusion
    from diffusion.samplers import SAMPLERS, sample
    from diffusion.spacings import SPACINGS

__all__ = ["DIFFUSIONS", "EDM", "SAMPLERS", "SPACINGS", "Diffusion", "FlowMatching", "GaussianDiffusion"]
__all__ += ["Prediction", "SamplingOptions", "sample"]
HOMES = ("presets", "diffusion", "samplers", "spacings", "options")


def __getattr__(name: str) -> Any:
    if name in __all__:
        for home in HOMES:
            module = import_module(f"diffusion.{home}")
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
