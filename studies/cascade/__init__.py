"""Cascade: three shallow stages in place of one deep model, which generate a small image, upsample it and refine it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from diffusion.presets import DIFFUSIONS, gaussian
from models import BACKBONES
from settings import check_name

if TYPE_CHECKING:
    import studies.cascade.cascade_diffusion


def cascade(
    coarse: str = "diffusion",
    upsampler: str = "pixelshuffle",
    refiner: str = "vit",
    factor: Annotated[int, "[2, inf)"] = 2,
    schedule: str = "linear",
    num_timesteps: Annotated[int, "[2, inf)"] = 1000,
    prediction: str = "v",
    sigma: Annotated[float, "(0, inf)"] = 0.5,
    phases: Annotated[Sequence[int | float], "[0, inf)"] = (35, 35, 30),
    forcing: Annotated[Sequence[Sequence[int | float]], "[0, 1]"] = ((0.9, 0.1), (0.1, 0.0)),
    augmentation: Annotated[Sequence[int | float], "[0, 1]"] = (0.5, 0.1),
) -> "studies.cascade.cascade_diffusion.Cascade":
    """small images, upsampled and refined; needs --model Cascade

    The upsampler is trained on the coarse stage's one-step prediction of `x_0`. With `prediction: epsilon`, it divides
    the model's error by alpha, so it is only useful for schedules that do not end in pure noise.

    Args:
        coarse: first stage: 'diffusion', 'dae' (a denoising autoencoder) or 'resnet' (maps noise to an image)
        upsampler: 'pixelshuffle', 'bilinear' (followed by a convolution), 'resnet' or 'interpolation'
        refiner: 'vit', 'conv', 'none', or 'diffusion' (super-resolution: Ho et al. 2021)
        factor: side of the images divided by that of the first stage's
        schedule: noise schedule of stages that are diffusions, as for 'gaussian'
        num_timesteps: number of timesteps of stages that are diffusions
        prediction: prediction of stages that are diffusions: 'epsilon', 'x_0' or 'v'
        sigma: for 'dae': standard deviation of its noise
        phases: relative lengths of the three training phases: first stage alone, the other two, all together
        forcing: probability of teacher forcing (upsampling the true small image, not the first stage's) at the
            beginning and end of the second phase, and of the third
        augmentation: for the refiner 'diffusion': noise added to its small image, at most in training and at sampling,
            as fractions of the timesteps
    """
    from studies.cascade.cascade_diffusion import PHASES, Cascade
    from studies.cascade.denoising import Denoising
    from studies.cascade.refinement import Refinement, SuperResolution

    if len(phases) != len(PHASES) or min(phases) < 0 or not sum(phases) > 0:
        raise ValueError(f"--diffusion.phases {list(phases)}: give the lengths of three phases, such as [35, 35, 30]")
    if len(forcing) != 2 or any(len(ends) != 2 or not all(0 <= p <= 1 for p in ends) for ends in forcing):
        raise ValueError(
            f"--diffusion.forcing {[list(ends) for ends in forcing]}: give a first and a last probability for the "
            "second phase and for the third, such as [[0.9, 0.1], [0.1, 0]]"
        )
    images = gaussian(schedule, num_timesteps, prediction, "fixed_small")
    stages = {"diffusion": images, "dae": Denoising(1.0, sigma), "resnet": Denoising(0.0, 1.0)}
    check_name("--diffusion.coarse", coarse, stages)
    refinement = SuperResolution(images, augmentation) if refiner == "diffusion" else Refinement()
    parts = {"coarse": coarse, "upsampler": upsampler, "refiner": refiner, "factor": factor}
    return Cascade(stages[coarse], refinement, factor, phases, forcing, parts)


DIFFUSIONS["cascade"] = cascade
BACKBONES["Cascade"] = ("studies.cascade.three_stages:Cascade", {})
