"""Scores of two sets of images for tests: the core of evaluate.py, without its sources and files."""

from metrics.features import Extractor
from metrics.fidelity import compute_scores
from metrics.image_batches import image_batches
from metrics.scores import DEFAULT


def score(samples, reference, extractor="inception", metrics=DEFAULT, *, batch_size=64, weights_path=None, seed=0):
    """Score samples against a reference; both are tensors or datasets of uint8 images."""
    if not isinstance(extractor, Extractor):
        extractor = Extractor(extractor, weights_path=weights_path)
    features = [
        extractor(image_batches(images, batch_size), len(images), metrics=metrics, progress=False, desc=desc)
        for images, desc in ((samples, "samples"), (reference, "reference"))
    ]
    return compute_scores(*features, extractor, metrics=metrics, seed=seed)


def value(scores, name):
    """Value of a score, which must have one."""
    value = scores.scores[name].value
    assert value is not None, scores.scores[name].reason
    return value
