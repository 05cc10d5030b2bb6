"""How samples are drawn, as one object from a command line to `sample`. No torch here: see `settings`."""

from dataclasses import dataclass, field
from typing import Any

from settings import within


@dataclass(frozen=True)
class SamplingOptions:
    """Which sampler takes which steps, and what guides them.

    Args:
        sampler: null is the diffusion's own: 'ddpm' (gaussian), 'euler' (flow), 'heun' (edm: two calls a step),
            'meanflow' and 'shortcut' (of these kinds, by averages; shortcut in 1, 2, 4, ... steps) or 'iterated' (a
            cascade's 'dae' and 'resnet'); others: 'ddim', 'euler_maruyama' (of the reverse SDE), 'dpmpp_2m',
            'dpmpp_2m_sde' and 'dpmpp_3m' (DPM-Solver++), 'exponential_ab3' (for many steps), 'unipc'
        sampler_args: the sampler's own arguments, such as --sampling.sampler_args.eta 0.5: 'ddim' takes eta, 0 (not
            random) to 1 (as 'ddpm'); 'heun' takes churn, noise added over the whole chain (Karras et al. 2022)
        num_steps: steps a sample: calls of the model, each of both halves under guidance; null: 150, of 'meanflow' and
            'shortcut' 1
        spacing: of the steps: null is the diffusion's own: 'uniform' in time (gaussian, flow) or 'karras' (edm);
            'trailing', 'quadratic', 'log_snr'; or a text file of noise levels sigma / alpha
        guidance_scale: classifier-free guidance (Ho and Salimans 2022): 1 turns it off
        guidance_interval: least and largest noise level sigma / alpha at which to guide (Kynkäänniemi et al. 2024)
        guidance_rescale: 0 to 1: how far to bring the output's standard deviation back (Lin et al. 2023: 0.7)
        guidance_parallel: share of the push along the predicted image that is kept; 0: projected (Sadat et al. 2024)
        guidance_radius: largest norm of the push; null: none
        legacy_cfg_channels: guide the first channels only, as published samplers did (3); null: all
        clip: largest absolute value of each step's predicted data (Ho et al. 2020); null: 1 in pixel space, no limit
            for latents; .inf: no limit
    """

    sampler: str | None = None
    sampler_args: dict[str, Any] = field(default_factory=dict)
    num_steps: int | None = within("[1, inf)", None)
    spacing: str | None = None
    guidance_scale: float = within("[0, inf)", 1.0)
    guidance_interval: list[float] | None = within("[0, inf]", None)
    guidance_rescale: float = within("[0, 1]", 0.0)
    guidance_parallel: float = within("(-inf, inf)", 1.0)
    guidance_radius: float | None = within("(0, inf)", None)
    legacy_cfg_channels: int | None = within("[1, inf)", None)
    clip: float | None = within("(0, inf]", None)

    def check(self, prefix: str) -> None:
        interval = self.guidance_interval
        if isinstance(interval, list) and (len(interval) != 2 or interval[0] >= interval[1]):
            raise ValueError(
                f"{prefix}guidance_interval {interval}: give the least and the largest sigma / alpha, such as [0.2, 5]"
            )
