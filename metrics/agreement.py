"""Class agreement: whether a linear probe assigns samples to the class that they were generated for."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from metrics.scores import Score

DECAYS = (1e-4, 1e-3, 1e-2, 1e-1)  # chosen from by accuracy on a held-out fifth
FITTING = 1  # version of `fit_probe`: fitted probes are kept
TOP = 5


@dataclass(frozen=True)
class Probe:
    """A linear classifier of features, `logits = (x - mean) / scale @ weight.T + bias`."""

    mean: Float[Tensor, " d"]
    scale: Float[Tensor, " d"]
    weight: Float[Tensor, "k d"]
    bias: Float[Tensor, " k"]

    def __call__(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        return linear((features.to(self.mean) - self.mean) / self.scale, self.weight, self.bias)


@dataclass(frozen=True)
class Labelled:
    """Features and classes of images; for a reference, also the probe of its training images."""

    features: Float[Tensor, "n d"]
    labels: Int64[Tensor, " n"]
    probe: Probe | None = None


def fit_probe(features: Float[Tensor, "n d"], labels: Int64[Tensor, " n"], num_classes: int) -> Probe:
    """Fit multinomial logistic regression to standardised features by L-BFGS. The weight decay of `DECAYS` is chosen by
    the accuracy of a fit to four fifths of the images on the last fifth, which is stratified by class."""
    mean, scale = features.mean(dim=0), features.std(dim=0, correction=0).clamp(min=1e-6)
    standardised = ((features - mean) / scale).float()
    order = labels.argsort(stable=True)
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    held_out[order[4::5]] = True
    weight = bias = None
    accuracies = {}
    for decay in sorted(DECAYS, reverse=True) if held_out.any() else ():  # each fit starts from that of a larger decay
        weight, bias = _regress(standardised[~held_out], labels[~held_out], num_classes, decay, weight, bias)
        correct = linear(standardised[held_out], weight, bias).argmax(dim=1) == labels[held_out]
        accuracies[decay] = correct.double().mean().item()
    best = max(accuracies, key=lambda decay: accuracies[decay], default=DECAYS[1])
    weight, bias = _regress(standardised, labels, num_classes, best, weight, bias)
    return Probe(mean.float(), scale.float(), weight, bias)


def class_agreement(samples: Labelled, reference: Labelled) -> dict[str, Score]:
    """Compute top-1 and top-5 accuracy of the reference's probe on samples."""
    assert reference.probe is not None
    guesses = reference.probe(samples.features).topk(min(TOP, len(reference.probe.bias)), dim=1).indices
    correct = guesses == samples.labels[:, None]
    return {"agreement": _accuracy(correct[:, 0]), "agreement_top5": _accuracy(correct.any(dim=1))}


def classification_accuracy(samples: Labelled, reference: Labelled) -> dict[str, Score]:
    """Compute the accuracy of a probe fitted to samples on held-out images (classification accuracy score, Ravuri and
    Vinyals 2019)."""
    assert reference.probe is not None
    probe = fit_probe(samples.features, samples.labels, len(reference.probe.bias))
    return {"cas": _accuracy(probe(reference.features).argmax(dim=1) == reference.labels)}


def _accuracy(correct: Tensor) -> Score:
    share, num = correct.double().mean().item(), len(correct)
    return Score(share, (share * (1 - share) / num) ** 0.5, spread=f"standard error over {num} images")


def _regress(
    x: Tensor, labels: Tensor, num_classes: int, decay: float, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Minimise cross-entropy + decay / 2 * squared weights, starting from `weight` and `bias`, or zeros."""
    weight = (x.new_zeros(num_classes, x.shape[1]) if weight is None else weight.clone()).requires_grad_()
    bias = (x.new_zeros(num_classes) if bias is None else bias.clone()).requires_grad_()
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, history_size=10, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = cross_entropy(linear(x, weight, bias), labels) + decay / 2 * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)  # pyright: ignore[reportArgumentType]
    return weight.detach(), bias.detach()
