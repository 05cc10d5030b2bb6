"""Presets: functions that build a `Diffusion` of a named kind from its settings.

The parameters of a preset are the settings of its kind on the command line. Annotations hold their types and, as text,
the interval that numbers must lie in; the docstring is their help text. A setting that a docstring leaves out is
described by the first preset that has it. A preset imports torch only when it is called, so that `--help` is fast.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from settings import check_name

if TYPE_CHECKING:
    import diffusion.diffusion


def gaussian(
    schedule: str = "linear",
    num_timesteps: Annotated[int, "[2, inf)"] = 1000,
    prediction: str = "epsilon",
    variance: str = "learned_range",
    weighting: str = "uniform",
    times: str = "uniform",
    times_args: dict[str, Any] | None = None,
    zero_terminal_snr: bool = False,
    model_times: Annotated[Sequence[float] | None, "(-inf, inf)"] = None,
    loss: str | None = None,
    guidance_scale: Annotated[float, "(0, inf)"] = 1.0,
    guidance_max: Annotated[float | None, "(1, inf)"] = None,
) -> "diffusion.diffusion.Diffusion":
    """discrete time: Ho et al. 2020, Nichol and Dhariwal 2021

    Args:
        schedule: 'linear', 'scaled_linear', 'linear_unscaled' (the same for any T), 'cosine' or 'sigmoid'
        num_timesteps: T
        prediction: what the backbone predicts: 'epsilon', 'x_0' or 'v'
        variance: variance of the reverse step: 'learned_range' (hybrid loss; twice the channels), 'fixed_small' or
            'fixed_large'
        weighting: weighting of the squared error: 'uniform', 'min_snr', 'p2' or 'vlb'
        times: distribution of the training times: 'uniform', 'logit_normal', 'mode' or 'cosmap'
        times_args: of 'logit_normal': location, 0 (above: noisier; a flow's shift of s, in training alone, is log s),
            and scale, 1; of 'mode': scale, 1.29 (above 0: more of the middle, below: of both ends)
        zero_terminal_snr: rescale the schedule to end in pure noise (Lin et al. 2023)
        model_times: the backbone's time inputs at both ends, if not 0 and T-1, such as [1, 1000]
        loss: the target in which the squared error is measured, by the names of predictions; null: the prediction
        guidance_scale: scale of guidance that the backbone learns, so that sampling needs no second call
            (model-guidance, Tang et al. 2025); a step costs two calls more, without gradients; 1: none
        guidance_max: learn guidance of every scale from 1 to this, in place of a fixed one. The backbone is told the
            scale, which --sampling.guidance_scale chooses, at one call a step (Meng et al. 2023); null: none
    """
    import torch

    from diffusion.diffusion import Diffusion
    from diffusion.paths import GaussianChain
    from diffusion.schedules import SCHEDULES, with_zero_terminal_snr
    from diffusion.times import Device, draw_times

    check_name("--diffusion.schedule", schedule, SCHEDULES)
    draw_shares = draw_times(times, times_args)
    if num_timesteps < 2:
        raise ValueError(f"--diffusion.num_timesteps {num_timesteps} must be at least 2")
    betas = SCHEDULES[schedule](num_timesteps)
    if betas.max() >= 1:
        raise ValueError(
            f"--diffusion.num_timesteps {num_timesteps} is too few for the {schedule} schedule: beta reaches "
            f"{betas.max():.3g}; use more, or --diffusion.schedule cosine"
        )
    if zero_terminal_snr and prediction == "epsilon":
        raise ValueError(
            "--diffusion.zero_terminal_snr true: x_t at T-1 is then the noise itself, and predicting that says nothing "
            "of the data; use --diffusion.prediction v or x_0"
        )

    def draw(num: int, generator: torch.Generator | None, device: Device) -> torch.Tensor:
        if times == "uniform":
            return torch.randint(num_timesteps, (num,), generator=generator, device=device)
        return (draw_shares(num, generator, device) * num_timesteps).long()

    path = GaussianChain(with_zero_terminal_snr(betas) if zero_terminal_snr else betas, model_times)
    return Diffusion(
        path,
        prediction,
        loss,
        times=draw,
        weighting=weighting,
        variance=variance,
        guidance_scale=guidance_scale,
        guidance_max=guidance_max,
        default_sampler="ddpm",
    )


def flow(
    path: str = "linear",
    times: str = "uniform",
    times_args: dict[str, Any] | None = None,
    shift: Annotated[float, "(0, inf)"] = 1.0,
    model_times: Annotated[Sequence[float], "(-inf, inf)"] = (0.0, 999.0),
    prediction: str = "velocity",
    loss: str | None = None,
    guidance_scale: Annotated[float, "(0, inf)"] = 1.0,
    guidance_max: Annotated[float | None, "(1, inf)"] = None,
    contrast: Annotated[float, "[0, 1)"] = 0.0,
) -> "diffusion.diffusion.Diffusion":
    """flow matching: Lipman et al. 2023, Liu et al. 2023, Ma et al. 2024

    Args:
        path: 'linear' or 'trigonometric'
        shift: of training and sampling times towards the noise, for larger images; 1 shifts nothing
        model_times: the backbone's time inputs at the data and at the noise, such as [1, 0]
        prediction: what the backbone predicts: 'velocity', 'epsilon', 'x_0' or 'v'
        contrast: weight of the distance to the velocity of another sample of the batch, subtracted from the training
            loss (contrastive flow matching, Stoica et al. 2025: 0.05); with prediction 'velocity'
    """
    from diffusion.diffusion import Diffusion
    from diffusion.paths import CURVES, Flow
    from diffusion.times import draw_times

    check_name("--diffusion.path", path, CURVES)
    flow_path, draw = Flow(path, shift, model_times), draw_times(times, times_args)
    return Diffusion(
        flow_path,
        prediction,
        loss,
        times=lambda *batch: flow_path.shifted(draw(*batch)),
        guidance_scale=guidance_scale,
        guidance_max=guidance_max,
        contrast=contrast,
    )


def edm(
    sigma_data: Annotated[float, "(0, inf)"] = 1.0,
    P_mean: Annotated[float, "(-inf, inf)"] = -0.5,
    P_std: Annotated[float, "(0, inf)"] = 1.2,
    sigma_min: Annotated[float, "(0, inf)"] = 0.002,
    sigma_max: Annotated[float, "(0, inf)"] = 80.0,
    uncertainty: bool = False,
    prediction: str = "F",
    loss: str | None = None,
    guidance_scale: Annotated[float, "(0, inf)"] = 1.0,
    guidance_max: Annotated[float | None, "(1, inf)"] = None,
) -> "diffusion.diffusion.Diffusion":
    """Karras et al. 2022

    The published weight of the error of `x_0`, `(sigma^2 + sigma_data^2) / (sigma sigma_data)^2`, is a weight of 1 of
    the error of F, which is the default loss. The published `P_mean` is -1.2 for sigma_data 0.5, hence -0.5 for 1.

    Args:
        sigma_data: standard deviation of the data
        P_mean: mean of log sigma in training
        P_std: standard deviation of log sigma in training
        sigma_min: smallest noise of a sampler
        sigma_max: noise that a sampler starts from
        uncertainty: have the model learn how large its error is, and weight the loss by it
        prediction: what the backbone predicts: 'F', 'epsilon', 'x_0' or 'v'
    """
    import torch

    from diffusion.diffusion import Diffusion
    from diffusion.paths import VarianceExploding
    from diffusion.times import Device

    def draw(num: int, generator: torch.Generator | None, device: Device) -> torch.Tensor:
        return (P_mean + P_std * torch.randn(num, generator=generator, device=device)).exp()

    path = VarianceExploding(sigma_data, sigma_min, sigma_max)
    return Diffusion(
        path,
        prediction,
        loss,
        times=draw,
        uncertainty=uncertainty,
        guidance_scale=guidance_scale,
        guidance_max=guidance_max,
        default_sampler="heun",
        default_spacing="karras",
    )


def meanflow(
    interval_share: Annotated[float, "(0, 1]"] = 0.25,
    adaptive_power: Annotated[float, "[0, inf)"] = 1.0,
    omega: Annotated[float, "(0, inf)"] = 1.0,
    kappa: Annotated[float, "[0, 1)"] = 0.0,
    guidance_max: Annotated[float | None, "(1, inf)"] = None,
    tangent: str = "sample",
    difference: Annotated[float | None, "(0, 0.5)"] = None,
    prediction: str = "velocity",
    times: str = "logit_normal",
    times_args: dict[str, Any] | None = None,
    model_times: Annotated[Sequence[float], "(-inf, inf)"] = (0.0, 999.0),
) -> "diffusion.diffusion.Diffusion":
    """average velocities, for sampling in one call: Geng et al. 2025

    Args:
        interval_share: share of the batch that learns average velocities; the rest learns the velocity
        adaptive_power: p of the loss weight 1 / (mse + 0.001)^p; 0: none
        omega: guidance in training, with a scale of omega / (1 - kappa); omega 1 and kappa 0: none
        kappa: weight of the backbone's own prediction in this guidance
        tangent: the velocity along which the average is differentiated: 'sample', that of the sample, or 'model', the
            backbone's prediction, which has less variance (improved MeanFlow, Geng et al. 2025b)
        difference: take this derivative as the difference quotient of two calls, this far before and after t, which
            averages the ripples of time embeddings out and keeps a compiled backbone compiled; null: the exact one
        prediction: what the backbone predicts: 'velocity', or 'x_0', the data that a step by this velocity to t = 0
            leads to (Lu et al. 2026); to fine-tune a flow's weights, the flow's
        times_args: of 'logit_normal': location, here -0.4 as published, and scale, 1; of 'mode': scale, 1.29
        model_times: the backbone's time inputs at the data and at the noise; to fine-tune a flow's weights, the flow's
    """
    from diffusion.average_velocity import MeanFlow
    from diffusion.paths import Flow
    from diffusion.times import draw_times

    if times == "logit_normal":
        times_args = {"location": -0.4, **(times_args or {})}
    return MeanFlow(
        Flow("linear", 1.0, model_times),
        prediction=prediction,
        times=draw_times(times, times_args),
        interval_share=interval_share,
        adaptive_power=adaptive_power,
        guidance_max=guidance_max,
        omega=omega,
        kappa=kappa,
        tangent=tangent,
        difference=difference,
    )


def shortcut(
    interval_share: Annotated[float, "(0, 1]"] = 0.25,
    adaptive_power: Annotated[float, "[0, inf)"] = 0.0,
    sections: Annotated[int, "[2, inf)"] = 128,
    guidance_scale: Annotated[float, "(0, inf)"] = 1.0,
    guidance_max: Annotated[float | None, "(1, inf)"] = None,
    prediction: str = "velocity",
    times: str = "uniform",
    times_args: dict[str, Any] | None = None,
    model_times: Annotated[Sequence[float], "(-inf, inf)"] = (0.0, 999.0),
) -> "diffusion.diffusion.Diffusion":
    """each step consistent with two of half its length, for sampling in 1, 2, 4, ... calls: Frans et al. 2024

    Args:
        sections: number of Euler steps that the path is divided into, a power of two; longer steps are learned from
            shorter ones
        guidance_scale: scale of the guidance that longer steps learn in training; 1: none
        prediction: what the backbone predicts: 'velocity', or 'x_0', the data that a step by this velocity to t = 0
            leads to (Lu et al. 2026); to fine-tune a flow's weights, the flow's
        times_args: of 'logit_normal': location, 0, and scale, 1; of 'mode': scale, 1.29
        model_times: the backbone's time inputs at the data and at the noise; to fine-tune a flow's weights, the flow's
    """
    from diffusion.average_velocity import Shortcut
    from diffusion.paths import Flow
    from diffusion.times import draw_times

    return Shortcut(
        Flow("linear", 1.0, model_times),
        prediction=prediction,
        times=draw_times(times, times_args),
        interval_share=interval_share,
        adaptive_power=adaptive_power,
        guidance_max=guidance_max,
        guidance_scale=guidance_scale,
        sections=sections,
    )


DIFFUSIONS: dict[str, Callable[..., Any]] = {"gaussian": gaussian, "flow": flow, "edm": edm}
DIFFUSIONS |= {"meanflow": meanflow, "shortcut": shortcut}
GaussianDiffusion, FlowMatching, EDM = gaussian, flow, edm
