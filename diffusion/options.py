"""The options of sampling, one object from the command line to `sample`. It does not import torch: see `settings`."""

from dataclasses import dataclass, field
from typing import Any

from settings import reads, within


@dataclass(frozen=True)
class SamplingOptions:
    """The sampler, its steps and its guidance.

    Args:
        sampler: null is the diffusion's default: 'ddpm' (gaussian), 'euler' (flow), 'heun' (edm: two calls a step),
            'meanflow' and 'shortcut' (average velocities, for these kinds only; shortcut in 1, 2, 4, ... steps) or
            'iterated' (a cascade's 'dae' and 'resnet'); others: 'ddim', 'euler_maruyama' (for the reverse SDE),
            'dpmpp_2m', 'dpmpp_2m_sde' and 'dpmpp_3m' (DPM-Solver++), 'exponential_ab3' (for many steps), 'unipc'
        sampler_args: arguments of the sampler, such as --sampling.sampler_args.eta 0.5: 'ddim' takes eta, from 0
            (deterministic) to 1 (as 'ddpm'); 'heun' takes churn, the noise added over all steps (Karras et al. 2022)
        num_steps: number of sampling steps; under classifier-free guidance each calls the model on twice the batch;
            null: 150, or 1 for 'meanflow' and 'shortcut'
        spacing: of the steps: null is the diffusion's default: 'uniform' in time (gaussian, flow) or 'karras' (edm);
            'trailing', 'quadratic', 'log_snr'; or a text file of noise levels sigma / alpha
        guidance_scale: scale of classifier-free guidance (Ho and Salimans 2022); 1 turns it off. A model of
            --diffusion.guidance_max is told it, and called once
        guidance_interval: smallest and largest noise level sigma / alpha at which to guide (Kynkäänniemi et al. 2024)
        guidance_rescale: 0 to 1: how far to restore the standard deviation of the output (Lin et al. 2023: 0.7)
        guidance_parallel: share kept of the guidance's component along the predicted image; 0: projected (Sadat et al.
            2024)
        guidance_radius: largest norm of the guidance's change of the predicted image; null: no limit
        legacy_cfg_channels: guide only the first channels, as published samplers did (3); null: all
        clip: largest absolute value of each step's predicted data (Ho et al. 2020); null: 1 in pixel space, no limit
            for latents; .inf: no limit
    """

    sampler: str | None = None
    sampler_args: dict[str, Any] = field(default_factory=dict)
    num_steps: int | None = within("[1, inf)", None)
    spacing: str | None = reads("name or file", None)
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
