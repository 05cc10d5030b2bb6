"""A metric is a row of one table, from which everything that names, prints or ranks scores reads."""

import math
import re

import pytest
import torch

from experiment.config import EvaluationConfig
from metrics import scores
from metrics.features import Extractor, Features
from metrics.fidelity import compute_scores
from metrics.scores import (
    METRICS,
    Metric,
    Score,
    check_metrics,
    column_title,
    is_lower_better,
    metric_name,
    required_features,
)

COLOURS = Extractor.__new__(Extractor)
COLOURS.kind, COLOURS.name, COLOURS.device = "program", "colours", "cpu"  # what scores are named by


def features(shift=0.0):
    x = torch.randn(30, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return Features.of(x + shift, logits=x)


@pytest.fixture
def table(monkeypatch):
    monkeypatch.setattr(scores, "METRICS", METRICS.copy())
    monkeypatch.setattr("metrics.fidelity.METRICS", scores.METRICS)
    return scores.METRICS


@pytest.mark.parametrize("name", METRICS)
def test_help_and_documents_say_what_the_row_says(root, name):
    row = METRICS[name]
    assert f"{name} ({row.better} is better): {row.summary}" in " ".join(EvaluationConfig.__doc__.split())
    rows = (root / "docs" / "evaluation.md").read_text().splitlines()
    told = next(line for line in rows if line.startswith("| ") and f"`{name}`" in line.split("|")[1])
    assert row.better in told.split("|")[3]


def test_a_score_finds_its_row_on_any_extractor():
    assert {name: metric_name(name, "inception", "inception") for name in METRICS} == {name: name for name in METRICS}
    assert metric_name("kid", "program", "mine") == "kernel_distance[mine]"
    assert [column_title(name) for name in ("fid", "frechet_distance[vgg16]", "fid, halves", "recall", "unknown")] == [
        "FID ↓",
        "Fréchet ↓",
        "FID ↓",
        "recall ↑",
        "unknown",
    ]
    lower = {"validation_loss": True, "spatial_frechet_distance[x]": True, "is": False, "precision": False}
    assert {name: is_lower_better(name) for name in lower} == lower
    assert is_lower_better("unknown") is None


def test_an_unknown_metric_is_refused_and_the_others_are_named():
    with pytest.raises(ValueError, match=r"--metrics fidd: choose from fid, sfid, is, kid, precision, recall, density"):
        check_metrics(["fid", "fidd"])
    with pytest.raises(ValueError, match=r"--metrics \(none\): choose from"):
        check_metrics([])


def test_a_custom_metric_gets_the_inputs_that_it_needs(table):
    def gap(samples, reference, *, scale=2.0, seed=0):
        return scale * (samples.mean() - reference.mean()).abs()

    def light(samples, reference):
        return samples.double().mean() - reference.double().mean()

    table["gap"] = Metric(gap, better="lower", digits=1)
    table["light"] = Metric(light, needs="images", better="higher")
    table["classes"] = Metric(lambda logits: logits.shape[1], needs="logits", better="higher", reference=False)
    table["share"] = Metric(lambda samples, reference: Score(1.5), better="higher", bounds=(0.0, 1.0))
    table["nothing"] = Metric(lambda samples, reference: math.nan, better="higher")
    check_metrics(table)
    assert required_features(["gap", "light", "fid"]) == {"features", "images", "moments"}
    found = compute_scores(
        features(3.0), features(), COLOURS, metrics=["gap", "light", "classes", "share", "nothing"], seed=5
    )
    assert found.scores["gap"].value == pytest.approx(6.0)
    assert found.scores["classes"].value == 2
    assert found.settings["gap"] == {"scale": 2.0, "seed": 5}
    assert found.scores["light"].reason == "the reference holds no images"
    assert found.scores["share"].reason == "it came out as 1.5"
    assert found.scores["nothing"].reason == "it came out as nan"


def test_features_are_compared_on_the_extractors_device(table):
    seen = []
    table["seen"] = Metric(lambda *inputs: seen.extend(x.device.type for x in inputs) or 0.0, better="higher")
    extractor = Extractor.__new__(Extractor)
    extractor.kind, extractor.name, extractor.device = "program", "colours", "meta"
    compute_scores(features(), features(), extractor, metrics=["seen"])
    assert seen == ["meta", "meta"]


def test_metrics_of_one_function_call_it_once(table):
    calls = []

    def both(samples, reference):
        calls.append(len(samples))
        return {"one": Score(1.0), "two": Score(2.0)}

    table |= {name: Metric(both, better="lower") for name in ("one", "two")}
    found = compute_scores(features(), features(), COLOURS, metrics=["one", "two"])
    assert ([score.value for score in found.scores.values()], calls) == ([1.0, 2.0], [30])


def test_the_table_costs_no_import_of_torch(root):
    heavy = re.findall(r"^(?:from|import) (?:torch|numpy|metrics)", (root / "metrics" / "scores.py").read_text(), re.M)
    assert heavy == []
