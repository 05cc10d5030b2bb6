"""The training objective: the diffusion's loss, and auxiliary losses."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from jaxtyping import Float
from torch import Tensor, nn

from autoencoders.codec import Codec
from diffusion.diffusion import Auxiliary, Diffusion
from experiment.config import AuxiliaryConfig
from metrics.perceptual import perceptual_network
from models.backbone import Backbone
from settings import check_name
from training.alignment import Alignment, RecordingModel
from training.batches import Batch


@dataclass(frozen=True)
class Phase:
    """The position of a step in the phases of a training."""

    number: int  # index of the phase
    step: int  # step within the phase
    num_steps: int  # length of the phase
    end: int  # first step of the training after the phase

    @property
    def progress(self) -> float:
        return self.step / max(1, self.num_steps - 1)


def phase_at(lengths: Sequence[int | float], step: int, num_steps: int) -> Phase:
    """Return the phase of a step in a training of `num_steps` steps with phases of these relative lengths."""
    ends = [round(num_steps * total / sum(lengths)) for total in accumulate(lengths)]
    number = next(number for number, end in enumerate(ends) if step < end)
    start = ends[number - 1] if number else 0
    return Phase(number, step - start, ends[number] - start, ends[number])


class Objective:
    """The diffusion's loss with auxiliary losses and alignment.

    A diffusion may set its attribute `objective` to a subclass. `heads` are the losses that are modules: they are
    trained and saved with the model, but are not part of it.
    """

    phases: Sequence[int | float] = (1.0,)  # relative lengths of the phases of a training
    trains_in_parts = False  # whether some of the model's parameters get no gradient in some phase
    can_align = True  # False if the loss does not call the model as `model(x_t, t, y)`

    def __init__(
        self, diffusion: Diffusion, auxiliary: Sequence[Auxiliary] = (), alignment: Alignment | None = None
    ) -> None:
        if alignment is not None and not self.can_align:
            raise ValueError(
                "--alignment.extractor: this --diffusion.kind trains its backbone in parts; set it to null"
            )
        self.diffusion, self.auxiliary, self.alignment = diffusion, auxiliary, alignment
        heads = {term.name: term.term for term in auxiliary if isinstance(term.term, nn.Module)}
        self.heads = nn.ModuleDict(heads if alignment is None else {**heads, "alignment": alignment})

    def draw_loss_args(
        self, shape: Sequence[int], generator: torch.Generator, device: torch.device | str = "cpu"
    ) -> dict[str, Tensor]:
        """Draw the loss's further random arguments for a batch of this shape, by name; the generator is on `device`."""
        return self.diffusion.draw_loss_args(shape, generator, device)

    def __call__(self, model: nn.Module, batch: Batch, phase: Phase | None = None) -> dict[str, Float[Tensor, " b"]]:
        """Compute the per-sample `loss` and its terms; in validation, without a phase, only comparable ones."""
        alignment = None if phase is None else self.alignment
        network = model if alignment is None else RecordingModel(model, alignment)
        auxiliary = self.auxiliary_terms(phase)
        terms = self.diffusion.training_loss(
            network, batch.x_0, batch.y, t=batch.t, noise=batch.noise, auxiliary=auxiliary, **batch.loss_args
        )
        if alignment is not None:
            terms["alignment"] = alignment(batch.features)
            terms["loss"] = terms["loss"] + alignment.weight * terms["alignment"]
        return terms

    def auxiliary_terms(self, phase: Phase | None) -> list[Auxiliary]:
        """Return the auxiliary losses: all in training, those with `is_fixed` in validation."""
        return [term for term in self.auxiliary if phase is not None or term.is_fixed]


def objective_class(diffusion: Diffusion) -> type[Objective]:
    """Return the class of objective that a diffusion names, by default `Objective`."""
    return getattr(diffusion, "objective", Objective)


def _distance(features: Tensor, others: Tensor) -> Float[Tensor, " b"]:
    return (features - others).float().square().flatten(1).mean(dim=1)


class Perceptual:
    """Perceptual loss: squared distance of a frozen network's features (Johnson et al. 2016, eq. 2)."""

    is_fixed = True

    def __init__(
        self, config: AuxiliaryConfig, model: nn.Module, codec: Codec, device: torch.device, data_time: float
    ) -> None:
        if not codec.in_pixel_space:
            raise ValueError("--auxiliary perceptual: it looks at images, not at latents; use --autoencoder pixel")
        self.network = perceptual_network(config.network, config.heads).to(device)

    def __call__(self, predicted: Tensor, x_0: Tensor, y: Tensor) -> Float[Tensor, " b"]:
        with torch.no_grad():
            target = self.network(x_0)
        return _distance(self.network(predicted), target)


class FeatureMatching:
    """Feature matching: distance of the backbone's own activations for predicted and true `x_0`, at time 0."""

    is_fixed = False

    def __init__(
        self, config: AuxiliaryConfig, model: Backbone, codec: Codec, device: torch.device, data_time: float
    ) -> None:
        if type(model).encode is Backbone.encode and not model.repeated_blocks():
            raise ValueError(
                f"--auxiliary feature_matching: {type(model).__name__} has no block_types; take another --model"
            )
        self.encode, self.data_time = model.encode, data_time

    def __call__(self, predicted: Tensor, x_0: Tensor, y: Tensor) -> Float[Tensor, " b"]:
        t = torch.full((len(y),), self.data_time, device=y.device)
        with torch.no_grad():
            target = self.encode(x_0, t, y)
        pairs = zip(self.encode(predicted, t, y), target, strict=True)
        return torch.stack([_distance(*pair) for pair in pairs]).mean(0)


AUXILIARY = {"perceptual": Perceptual, "feature_matching": FeatureMatching}


def clean_time(diffusion: Diffusion) -> float:
    """The time that a backbone is given for data without noise."""
    times = getattr(diffusion.path, "model_times", None)
    return float(times[0]) if times else 0.0


def build_auxiliary(
    configs: Sequence[AuxiliaryConfig], model: Backbone, codec: Codec, device: torch.device, data_time: float = 0.0
) -> list[Auxiliary]:
    """Build the auxiliary losses of a configuration; raise `ValueError` for invalid settings."""
    terms: dict[str, Auxiliary] = {}
    for config in configs:
        check_name("--auxiliary", config.kind, AUXILIARY)
        if config.kind in terms:
            raise ValueError(f"--auxiliary {config.kind}: given twice")
        if not config.weight > 0:
            raise ValueError(f"--auxiliary {config.kind}: weight {config.weight} must be above 0")
        term = AUXILIARY[config.kind](config, model, codec, device, data_time)
        terms[config.kind] = Auxiliary(config.kind, config.weight, term, term.is_fixed)
    return list(terms.values())
