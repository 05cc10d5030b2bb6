"""The schedulers of diffusers that make the same steps as our samplers."""

import math
from dataclasses import asdict
from typing import Any

from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler

# Sampling settings that an exported pipeline has; all others must have their defaults.
SUPPORTED = {"sampler", "num_steps", "spacing", "guidance_scale", "legacy_cfg_channels", "clip"}
PREDICTIONS: dict[str, dict[str, Any]] = {  # by kind: our name of each prediction, and the scheduler's
    "gaussian": {"epsilon": "epsilon", "x_0": "sample", "v": "v_prediction"},
    "flow": {"velocity": "velocity", "x_0": "velocity"},  # the pipeline converts x_0 to a velocity
    "edm": {"F": "epsilon"},
}
GAUSSIAN = [("gaussian", sampler) for sampler in ("ddpm", "ddim", "dpmpp_2m")]
SPACINGS = {  # by kind, sampler and spacing: the pipeline's name of the spacing
    **{(*chain, name): name for chain in GAUSSIAN for name in ("uniform", "trailing")},
    ("flow", "euler", "uniform"): "flow",
    ("edm", "euler", "karras"): "karras",
}


def to_scheduler(kind: str, diffusion: Any, sampling: Any) -> tuple[Any, str]:
    """Return diffusers' scheduler of the same steps, and its spacing's name; ValueError names a setting without one."""
    if diffusion.guidance_max is not None:
        raise ValueError(
            f"--diffusion.guidance_max {diffusion.guidance_max:g}: the model is told its guidance scale, diffusers' "
            "pipelines tell none; sample.py draws from it"
        )
    defaults = asdict(type(sampling)())
    for name, value in asdict(sampling).items():
        if name not in SUPPORTED and value != defaults[name]:
            raise ValueError(f"--sampling.{name} {value}: diffusers' schedulers do not have it; sample without")
    sampler, path = sampling.sampler, diffusion.path
    spacing = SPACINGS.get((kind, sampler, sampling.spacing))
    if spacing is None:
        known = " or ".join(f"--sampler {chain[1]} --spacing {chain[2]}" for chain in SPACINGS if chain[0] == kind)
        raise ValueError(
            f"--sampler {sampler} with --spacing {sampling.spacing}: no scheduler in diffusers; "
            + (f"give {known}" if known else f"for {kind} there is none")
        )
    if diffusion.prediction not in PREDICTIONS[kind]:
        raise ValueError(
            f"--diffusion.prediction {diffusion.prediction}: of a {kind} diffusers' schedulers take "
            f"{' or '.join(PREDICTIONS[kind])} only; sample.py supports the others"
        )
    limit = sampling.clip or math.inf
    clips = math.isfinite(limit)
    if clips and sampler != "ddpm":
        raise ValueError(
            f"--clip {limit:g}: in diffusers only the scheduler of ddpm cuts predictions to what pixels can be; "
            "--sampler ddpm, or --clip .inf where samples come out well without"
        )
    if kind == "flow":
        if path.curve != "linear":
            raise ValueError(f"--diffusion.path {path.curve}: diffusers' flows are linear")
        return FlowMatchEulerDiscreteScheduler(1000, shift=float(path.shift)), spacing
    if kind == "edm":
        low, high = path.noise_range
        return EDMEulerScheduler(low, high, path.sigma_data), spacing
    prediction = PREDICTIONS[kind][diffusion.prediction]
    options: dict[str, Any] = {"trained_betas": path.betas.tolist(), "prediction_type": prediction}
    if sampler == "ddpm":
        options |= {"clip_sample": clips, **({"clip_sample_range": limit} if clips else {})}
        return DDPMScheduler(path.num_timesteps, **options, variance_type=diffusion.variance), spacing
    if path.alphas_cumprod[-1] == 0:
        raise ValueError("--diffusion.zero_terminal_snr true: diffusers' DPM-Solver starts at 1 / 0; --sampler ddpm")
    options |= {"solver_order": 1 if sampler == "ddim" else 2, "solver_type": "midpoint"}  # DDIM is order 1
    options |= {"final_sigmas_type": "zero", "lower_order_final": False}
    return DPMSolverMultistepScheduler(path.num_timesteps, **options), spacing


def time_mapping(kind: str, diffusion) -> tuple[float, float]:
    """Return offset and rate that map the scheduler's timestep to the time that the backbone is given."""
    if kind == "flow":  # the scheduler's timestep is 1000 t
        first, last = diffusion.path.model_times
        return first, (last - first) / 1000
    if kind == "edm":  # the scheduler's timestep is log(sigma) / 4
        low, high = (math.log(sigma) for sigma in diffusion.path.noise_range)
        return -999 * low / (high - low), 4 * 999 / (high - low)
    first, last = diffusion.path.model_times or (0.0, float(diffusion.path.max_time))
    return first, (last - first) / diffusion.path.max_time
