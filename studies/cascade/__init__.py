"""Three shallow stages in place of one deep model: a small image from noise, upsampled, refined."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from diffusion.presets import DIFFUSIONS, gaussian
from settings import check_name

if TYPE_CHECKING:
    import studies.cascade.cascade_diffusion

COARSE = ("diffusion", "dae", "resnet")


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
    """small images, upsampled, refined; --model Cascade

    A one-step `x_0` divides errors of `epsilon` by alpha: that prediction is for chains that do not end in noise.

    Args:
        coarse: the first stage: 'diffusion', 'dae' (a denoising autoencoder) or 'resnet' (from noise)
        upsampler: 'pixelshuffle', 'bilinear' (and a convolution), 'resnet' or 'interpolation'
        refiner: 'vit', 'conv', 'none', or 'diffusion' (super-resolution: Ho et al. 2021)
        factor: side of the images over that of the first stage's
        schedule: of diffusions: see the gaussian's
        num_timesteps: of diffusions: T
        prediction: of diffusions: 'epsilon', 'x_0' or 'v'
        sigma: of 'dae': standard deviation of its noise
        phases: relative lengths of the training's three: the first stage, the other two, all
        forcing: probability of the true small image at the beginning and end of the second phase and of the third
        augmentation: of the refiner 'diffusion': noise of its image in training and at sampling, as shares of times
    """
    from studies.cascade.cascade_diffusion import PHASES, Cascade
    from studies.cascade.denoising import Denoising
    from studies.cascade.refinement import Refinement, SuperResolution

    check_name("--diffusion.coarse", coarse, COARSE)
    if len(phases) != len(PHASES) or min(phases) < 0 or not sum(phases) > 0:
        raise ValueError(f"--diffusion.phases {list(phases)}: give the lengths of three phases, such as [35, 35, 30]")
    if len(forcing) != 2 or any(len(ends) != 2 or not all(0 <= p <= 1 for p in ends) for ends in forcing):
        raise ValueError(
            f"--diffusion.forcing {[list(ends) for ends in forcing]}: give a first and a last probability for the "
            "second phase and for the third, such as [[0.9, 0.1], [0.1, 0]]"
        )
    images = gaussian(schedule, num_timesteps, prediction, "fixed_small")
    stages = {"diffusion": images, "dae": Denoising(1.0, sigma), "resnet": Denoising(0.0, 1.0)}
    refinement = SuperResolution(images, augmentation) if refiner == "diffusion" else Refinement()
    parts = {"coarse": coarse, "upsampler": upsampler, "refiner": refiner, "factor": factor}
    return Cascade(stages[coarse], refinement, factor, phases, forcing, parts)


DIFFUSIONS["cascade"] = cascade
