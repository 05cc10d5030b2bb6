"""Labels of samples, from class names or for scoring."""

import difflib
import unicodedata
from collections.abc import Sequence

import torch
from jaxtyping import Int64
from torch import Tensor

from data.subsets import stratified
from experiment.config import EvaluationConfig
from machine.randomness import generator_for
from settings import alternatives


def resolve_classes(asked: Sequence[str | int], classes: list[str]) -> list[int]:
    """Convert class names to labels. Numbers, also as text unless a class is called so, are labels already. Without
    names the result is all labels, and [0] for an unconditional model."""
    if not asked:
        return list(range(max(1, len(classes))))
    labels, composed = [], [unicodedata.normalize("NFC", name) for name in classes]
    for name in asked:
        if not classes:
            raise ValueError(f"--classes {name}: the model has no classes; leave it out")
        if isinstance(name, str) and (same := unicodedata.normalize("NFC", name)) in composed:  # macOS decomposes
            labels.append(composed.index(same))
        elif str(name) in map(str, range(len(classes))):
            labels.append(int(name))
        else:
            close = difflib.get_close_matches(str(name), classes, n=3, cutoff=0.4)
            known = f"did you mean {alternatives(close)}?" if close else f"there are {', '.join(classes[:10])}, ..."
            raise ValueError(f"--classes {name}: no such class among the {len(classes)}; {known}")
    return labels


def sample_labels(
    evaluation: EvaluationConfig,
    num_reference: int,
    num_classes: int,
    reference: Int64[Tensor, " m"] | None,
    trial: int = 0,
) -> Int64[Tensor, " n"]:
    """Choose the labels of samples to be scored by the policy `evaluation.labels`: `balanced`, all classes in turn;
    `reference`, each class in proportion to its frequency in the reference; or `random`, uniform over classes.

    There are as many samples as images in the reference, unless the evaluation says otherwise. `trial` is added to the
    seed.
    """
    num_images = evaluation.num_samples or num_reference
    if num_images < 1:
        raise ValueError("--num_samples: the reference does not say how many images it is of; give a number")
    if num_classes == 0 or evaluation.labels == "balanced":
        return balanced_labels(num_images, num_classes)
    if evaluation.labels == "reference":
        if reference is None:
            raise ValueError("--labels reference: the reference has no labels; choose from balanced, random")
        return reference[stratified(reference, num_images, evaluation.seed)]
    return torch.randint(num_classes, (num_images,), generator=generator_for(evaluation.seed + trial, "labels"))


def balanced_labels(num_images: int, num_classes: int) -> Int64[Tensor, " n"]:
    """All labels in turn, so that counts of classes differ by at most one; all 0 for an unconditional model."""
    return torch.arange(num_images) % max(1, num_classes)
