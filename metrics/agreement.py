"""Class agreement: whether samples are of the class that they were asked for, as a linear probe sees it."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from metrics.scores import Score

DECAYS = (1e-4, 1e-3, 1e-2, 1e-1)  # of which a held-out fifth chooses
TOP = 5


@dataclass(frozen=True)
class Probe:
    """A linear classifier of features: `logits = (x - mean) / scale @ weight.T + bias`."""

    mean: Float[Tensor, " d"]
    scale: Float[Tensor, " d"]
    weight: Float[Tensor, "k d"]
    bias: Float[Tensor, " k"]

    def __call__(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        return linear((features.to(self.mean) - self.mean) / self.scale, self.weight, self.bias)


@dataclass(frozen=True)
class Labelled:
    """Features and classes of some images; of a reference besides the probe of its training images."""

    features: Float[Tensor, "n d"]
    labels: Int64[Tensor, " n"]
    probe: Probe | None = None


def fit_probe(features: Float[Tensor, "n d"], labels: Int64[Tensor, " n"], num_classes: int) -> Probe:
    """Multinomial logistic regression on standardised features, by L-BFGS. Of `DECAYS` it takes the one under which
    four fifths of the images name most of the last fifth; each class has its share of that."""
    mean, scale = features.mean(dim=0), features.std(dim=0, correction=0).clamp(min=1e-6)
    standard = ((features - mean) / scale).float()
    order = labels.argsort(stable=True)
    held = torch.zeros(len(labels), dtype=torch.bool)
    held[order[4::5]] = True
    weight = bias = None
    named = {}
    for decay in sorted(DECAYS, reverse=True) if held.any() else DECAYS[:0]:  # the strongest first, to start the next
        weight, bias = _regress(standard[~held], labels[~held], num_classes, decay, weight, bias)
        right = linear(standard[held], weight, bias).argmax(dim=1) == labels[held]
        named[decay] = right.double().mean().item()
    best = max(named, key=lambda decay: named[decay], default=DECAYS[1])
    weight, bias = _regress(standard, labels, num_classes, best, weight, bias)
    return Probe(mean.float(), scale.float(), weight, bias)


def class_agreement(samples: Labelled, reference: Labelled) -> dict[str, Score]:
    """How many samples the probe takes for the class that they were asked for, and how many held-out images a probe of
    the samples takes for their own (the classification accuracy score: Ravuri and Vinyals 2019)."""
    assert reference.probe is not None
    num_classes = len(reference.probe.bias)
    guesses = reference.probe(samples.features).topk(min(TOP, num_classes), dim=1).indices
    hits = guesses == samples.labels[:, None]
    of_samples = fit_probe(samples.features, samples.labels, num_classes)
    named = of_samples(reference.features).argmax(dim=1) == reference.labels
    return {"agreement": _share(hits[:, 0]), "agreement_top5": _share(hits.any(dim=1)), "cas": _share(named)}


def _share(hits: Tensor) -> Score:
    share = hits.double().mean().item()
    return Score(share, (share * (1 - share) / len(hits)) ** 0.5, spread=f"standard error over {len(hits)} images")


def _regress(
    x: Tensor, labels: Tensor, num_classes: int, decay: float, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The minimum of cross-entropy + decay / 2 * squared weights."""
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
