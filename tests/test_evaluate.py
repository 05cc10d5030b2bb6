"""evaluate.py as a user runs it, and mistakes made with each entry point."""

import json
import os
from functools import partialmethod
from pathlib import Path
from unittest.mock import DEFAULT, Mock

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from processes import log, run, script

from evaluation.record import draw_sweep
from evaluation.scoring import Scorer, summarise
from evaluation.sources import Source
from experiment.cli import parse
from metrics.fidelity import Scores
from metrics.scores import Score


@pytest.fixture(scope="module")
def extractor(folder):
    """A TorchScript extractor: features are mean colours, probabilities soft classes of them."""

    class MeanColors(torch.nn.Module):
        def forward(self, images: torch.Tensor):
            means = images.float().mean(dim=(2, 3)) / 255
            return means, torch.softmax(4 * means, dim=1)

    path = folder / "colors.pt"
    from metrics.programs import save_program

    save_program(MeanColors(), torch.zeros(2, 3, 8, 8, dtype=torch.uint8), path)
    np.savez(folder / "fixed.npz", arr_0=np.zeros((10, 32, 32, 3), dtype=np.uint8))
    return path


FRECHET = ["frechet_distance[colors]", "frechet_distance[colors], halves"]


def scores(folder, name):
    return json.loads((folder / name).read_text())


def test_a_name_in_place_of_a_list_of_classes_is_refused(folder, extractor):
    images, labels = np.zeros((4, 32, 32, 3), np.uint8), np.zeros(4, np.int64)
    np.savez(folder / "one.npz", arr_0=images, arr_1=labels, classes=np.array("circle"))
    flags = ("--samples", "one.npz", "--checkpoint", "runs/tiny", "--extractor", extractor)
    done = run("evaluate.py", *flags, cwd=folder, check=False)
    assert done.returncode == 2
    assert "error: --samples one.npz: classes is <U6 [], not a list of names" in done.stderr


def test_scores_carry_their_provenance(folder, extractor):
    done = run("evaluate.py", "--samples", "runs/tiny", "--extractor", extractor, "--num_samples", 10, cwd=folder)
    assert "frechet_distance[colors]" in done.stdout
    assert "not FID" in done.stdout
    assert "alone are drawn" not in done.stdout
    record = scores(folder, "runs/tiny/scores.json")
    assert record["num_samples"] == 10
    assert record["samples"]["sampler"] == "ddpm"
    assert record["samples"]["step"] == 4
    assert len(record["extractor_sha256"]) == 64
    assert record["reference"]["source"] == "shapes"
    assert {"commit", "versions", "evaluation"} <= record.keys()
    assert record["scores"]["spatial_frechet_distance[colors]"]["value"] is None
    assert "Inception has" in record["scores"]["spatial_frechet_distance[colors]"]["reason"]
    assert (folder / "runs" / "tiny" / "scores.png").is_file()


def test_floor_and_ceiling_stand_beside_an_untrained_model(folder, extractor):
    flags = ("--extractor", extractor, "--num_samples", 20, "--output", "baselines.json", "--memorisation", "true")
    both = ("--baselines", "true", "--per_class", "true", "--labels", "reference", "--likelihood", 2)
    done = run("evaluate.py", "--samples", "runs/tiny", *flags, *both, cwd=folder)
    bits = scores(folder, "baselines.json")["bits_per_dimension"]
    assert bits["num_images"] == 2
    assert 0 < bits["value"] < 20  # of unit normal latents 2.05
    assert f"bits per dimension: {bits['value']:.4f}" in done.stdout
    rows = {row["name"]: row["scores"] for row in scores(folder, "baselines.json")["rows"]}
    assert list(rows) == ["tiny", "training images", "reconstructions"]
    model, floor, ceiling = (row["frechet_distance[colors]"]["value"] for row in rows.values())
    assert max(floor, ceiling) < model
    assert "| training images |" in done.stdout
    memorisation = scores(folder, "baselines.json")["memorisation"]
    assert 0 <= memorisation["closer_to_training_than_held_out"] <= 1
    assert "of copies of training images planted in their place" in done.stdout
    policies = [row["samples"].get("label_policy") for row in scores(folder, "baselines.json")["rows"]]
    assert policies == [None, "the samples'", "the samples'"]
    assert (folder / "baselines-nearest.png").is_file()
    classes = scores(folder, "baselines.json")["per_class"]
    assert len(classes) == 10
    assert all(score["reason"].startswith("too few images") for score in classes.values())


def test_label_metrics_are_also_scored_on_held_out_images_and_their_reconstructions(folder, extractor):
    flags = ("--extractor", extractor, "--metrics", "[fid, agreement, agreement_top5, cas]", "--baselines", "true")
    run("evaluate.py", "--samples", "runs/tiny", *flags, "--output", "classes.json", cwd=folder)
    rows = {row["name"]: row["scores"] for row in scores(folder, "classes.json")["rows"]}
    photographs, decoded = rows["held-out images"], rows["reconstructions of held-out images"]
    assert list(rows["training images"]) == list(rows["reconstructions"]) == [FRECHET[0], "cas[colors]", FRECHET[1]]
    assert list(photographs) == list(decoded) == [f"{name}[colors]" for name in ("agreement", "agreement_top5")]
    for row in (rows["tiny"], photographs, decoded):
        top, top5 = (row[f"{name}[colors]"]["value"] for name in ("agreement", "agreement_top5"))
        assert 0 <= top <= top5 <= 1
    assert 0 <= rows["tiny"]["cas[colors]"]["value"] <= 1  # of held-out images it would be what they had been taught
    assert "standard error" in rows["tiny"]["agreement[colors]"]["spread"]


def test_processes_and_batches_do_not_change_a_score(folder, extractor):
    flags = ("evaluate.py", "--samples", "runs/tiny", "--extractor", extractor, "--num_samples", 96)
    run(*flags, "--batch_size", 32, "--output", "one.json", cwd=folder)
    run(*flags, "--batch_size", 48, "--output", "two.json", processes=2, cwd=folder)
    one, two = (scores(folder, f"{name}.json")["scores"] for name in ("one", "two"))
    for name, score in one.items():
        if score["value"] is None:
            assert two[name] == score
        else:
            assert two[name]["value"] == pytest.approx(score["value"], rel=1e-3, abs=1e-6), name


COUNTED = """
import torch
from experiment.config import EvaluationConfig
from evaluation.scoring import Reference, Scorer
from evaluation.sources import from_images
from machine.accelerator import open_accelerator
from metrics.scores import METRICS, Metric

accelerator, calls = open_accelerator("fp32"), []
METRICS["of"] = Metric(lambda samples, reference: calls.append(samples) or float(len(samples)), "lower")
scorer = Scorer(EvaluationConfig(extractor="{extractor}", metrics=["of"]), accelerator)
images = from_images(torch.zeros(5, 3, 8, 8, dtype=torch.uint8), "black")
scores, features = scorer.score(images, Reference(scorer.extract(images), {{}}))
assert scores.scores["of"].value == 5
assert len(calls) == accelerator.is_main_process
"""


def test_one_process_computes_scores_for_all(tmp_path, extractor):
    (tmp_path / "counted.py").write_text(COUNTED.format(extractor=extractor))
    run(tmp_path / "counted.py", cwd=tmp_path, processes=2)


def test_trials_and_sweeps_are_rows_and_curves(folder, extractor):
    flags = (
        "--extractor",
        extractor,
        "--num_samples",
        12,
        "--output",
        "sweep.json",
        "--metrics",
        "[fid,precision,recall]",
    )
    run(
        *("evaluate.py", "--samples", "runs/tiny", *flags),
        *("--guidance_scale", "1,3", "--num_steps", "2", "--sampler", "ddim", "--trials", 2),
        *("--spacing", "uniform,log_snr"),
        cwd=folder,
    )
    rows = scores(folder, "sweep.json")["rows"]
    assert [row["samples"]["guidance_scale"] for row in rows] == [1.0, 3.0] * 2
    assert [row["samples"]["spacing"] for row in rows] == ["uniform"] * 2 + ["log_snr"] * 2
    assert [row["samples"]["num_steps"] for row in rows] == [2] * 4
    for row in rows:
        trials = [trial["frechet_distance[colors]"]["value"] for trial in row["trials"]]
        score = row["scores"]["frechet_distance[colors]"]
        assert trials[0] != trials[1]
        assert score["value"] == pytest.approx(np.mean(trials))
        assert score["std"] == pytest.approx(np.std(trials, ddof=1))
    assert (folder / "sweep-sweep.png").is_file()


def test_scores_during_training_are_those_of_evaluate(folder, extractor):
    flags = ("--evaluation.extractor", extractor, "--evaluation.num_samples", 12, "--log.evaluate_every", 4)
    flags += ("--evaluation.metrics", "[fid, kid, precision, agreement]")
    run("train.py", "--config", "tiny.yaml", "--name", "scored", *flags, cwd=folder)
    logged = next(event for event in log(folder, "scored") if "frechet_distance[colors]" in event)
    run("evaluate.py", "--samples", "runs/scored", cwd=folder)
    found = scores(folder, "runs/scored/scores.json")["scores"]
    for name in ("frechet_distance[colors]", "precision", "kernel_distance[colors]", "agreement[colors]"):
        assert logged[name] == pytest.approx(found[name]["value"], rel=1e-6), name


def test_references_are_written_read_and_reused(folder, extractor):
    flags = ("evaluate.py", "--samples", "runs/tiny", "--extractor", extractor, "--num_samples", 10)
    run(*flags, "--output", "a.json", "--write_reference", "reference.npz", cwd=folder)
    run(*flags, "--output", "b.json", "--reference", "reference.npz", cwd=folder)
    a, b = (scores(folder, f"{name}.json")["scores"] for name in ("a", "b"))
    assert a["frechet_distance[colors]"]["value"] == pytest.approx(b["frechet_distance[colors]"]["value"])
    assert a["precision"] == b["precision"]
    cached = list((folder / "cache" / "references").glob("shapes-*.safetensors"))
    assert cached
    before = [path.stat().st_mtime_ns for path in cached]
    done = run(*flags[:-1], 7, "--output", "c.json", cwd=folder)
    assert "--num_samples 7: only 7 of 10 classes are sampled, but compared with all" in done.stdout
    assert [path.stat().st_mtime_ns for path in cached] == before


def test_an_npz_is_scored_and_the_self_check_passes(folder, extractor):
    run("sample.py", "--checkpoint", "runs/tiny", "--num_per_class", 1, "--output", "drawn.npz", cwd=folder)
    flags = ("--checkpoint", "runs/tiny", "--extractor", extractor, "--seed", 1)
    run("evaluate.py", "--samples", "drawn.npz", *flags, "--output", "drawn.json", cwd=folder)
    assert scores(folder, "drawn.json")["num_samples"] == 10
    done = run("evaluate.py", "--self_check", "true", "--extractor", extractor, cwd=folder)
    assert done.stdout.count("ok  ") == 8
    assert "never with published FID" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train.py", "--data.path", "nowhere"), "--data.path nowhere"),
        (("train.py", "--model", "XSwinn"), "did you mean XSwin"),
        (
            ("train.py", "--sampling.sampler", "dppm"),
            "--sampling.sampler dppm: unknown, choose from ddpm, ddim",
        ),
        (("train.py", "--data.image_size", "60"), "multiple of 8"),
        (("train.py", "--resume", "runs/none"), "--resume runs/none: nothing to resume"),
        (("train.py", "--config", "tiny.yaml"), "runs/tiny holds a run already: --resume runs/tiny"),
        (("sample.py", "--checkpoint", "runs/tiny", "--classes", "[sta]"), "--classes sta: no such class"),
        (("sample.py", "--checkpoint", "runs/none"), "--checkpoint runs/none does not exist"),
        (("evaluate.py", "--samples", "runs/tiny", "--extractor", "inception"), "--weights_path FILE"),
        (("evaluate.py", "--extractor", "colors.pt"), "--samples: give a run"),
        (("evaluate.py", "--samples", "runs/none", "--extractor", "colors.pt"), "runs/none does not exist"),
        (
            ("evaluate.py", "--samples", "runs/tiny", "--extractor", "colors.pt", "--guidance_scale", "1,two"),
            "--sampling.guidance_scale 1,two: give a number",
        ),
        (
            ("evaluate.py", "--samples", "runs/tiny", "--extractor", "colors.pt", "--metrics", "[fidd]"),
            "--metrics fidd",
        ),
        (
            ("evaluate.py", "--samples", "runs/tiny", "--extractor", "colors.pt", "--likelihood", 1000),
            "--likelihood 1000 must lie in 2..",
        ),
        (
            (
                "evaluate.py",
                "--samples",
                "fixed.npz",
                "--checkpoint",
                "runs/tiny",
                "--extractor",
                "colors.pt",
                "--trials",
                2,
            ),
            "--trials 2: fixed.npz is a fixed set",
        ),
    ],
)
def test_mistakes_end_in_one_line(folder, extractor, arguments, message):
    before = {*(folder / "runs").iterdir()}
    done = run(*arguments, cwd=folder, check=False)
    assert done.returncode != 0
    assert {*(folder / "runs").iterdir()} == before  # no empty folder of a training that was refused
    last = done.stderr.strip().splitlines()[-1]
    assert "error:" in last
    assert message in last
    assert "Traceback" not in done.stderr


def row_of(metric, *values, **settings):
    trials = [Scores({metric: Score(value)}, 10) for value in values]
    return summarise(Source("run", 10, iter, settings), trials)


def test_a_sweep_has_a_line_for_each_value_of_whatever_is_swept(tmp_path, monkeypatch):
    usual = {"sampler": "heun", "spacing": "uniform", "num_steps": 10, "model_calls": 19}
    values = {(scale, rescale): scale + rescale for rescale in (0.0, 0.7) for scale in (1.0, 2.0)}
    rows = [
        row_of("fid", value, **usual, guidance_scale=scale, guidance_rescale=rescale)
        for (scale, rescale), value in values.items()
    ]
    drawn, errorbar = {}, Axes.errorbar

    def watched(axes, x, y, *errors, label, **look):
        drawn.setdefault(label, (x, y))
        return errorbar(axes, x, y, *errors, label=label, **look)

    monkeypatch.setattr(Axes, "errorbar", watched)
    draw_sweep(rows, tmp_path / "sweep.png", ["guidance_rescale"])
    assert drawn == {f"guidance_rescale {rescale}": ([1.0, 2.0], [1 + rescale, 2 + rescale]) for rescale in (0.0, 0.7)}


def test_settings_that_cannot_be_scored_cost_no_others(folder, extractor):
    flags = ("--extractor", extractor, "--num_samples", 4, "--metrics", "[fid]", "--output", "diverged.json")
    done = run("evaluate.py", "--samples", "runs/tiny", *flags, "--guidance_scale", "1.5,1e38,2", cwd=folder)
    assert "tiny: no scores: " in done.stdout
    values = [row["scores"]["frechet_distance[colors]"] for row in scores(folder, "diverged.json")["rows"]]
    assert [isinstance(score["value"], float) for score in values] == [True, False, True]
    assert "not finite" in values[1]["reason"]
    assert not list(folder.glob("diverged.json.unfinished*"))
    flags += ("--guidance_scale", 1e38, "--likelihood", 2)
    alone = run("evaluate.py", "--samples", "runs/tiny", *flags, cwd=folder, check=False)
    assert alone.returncode == 2
    assert "over 2 held-out images" in alone.stdout


def test_folders_that_cannot_be_written_are_found_before_anything_is_scored(folder, extractor, tmp_path, monkeypatch):
    """Scores of a colleague's run, and features of a reference for a shared cache, were lost after hours."""
    evaluate = script("evaluate.py")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) == tmp_path)
    monkeypatch.setattr(Scorer, "extract", None)
    flags = ["--samples", "runs/tiny", "--extractor", str(extractor)]
    with pytest.raises(ValueError, match=r"--output runs/tiny/scores\.json: nothing can be written in "):
        evaluate.main(parse(evaluate.EvaluateConfig, flags))
    flags += ["--output", str(tmp_path / "scores.json"), "--data.cache", "shared"]
    with pytest.raises(ValueError, match=r"--data.cache shared/references/shapes-.*: nothing can be written in "):
        evaluate.main(parse(evaluate.EvaluateConfig, flags))


def test_what_is_scored_outlives_the_process(folder, extractor, monkeypatch):
    evaluate, score, scored = script("evaluate.py"), Scorer.score, []

    def killed(scorer, source, *more):
        if len(scored) == 2:
            raise KeyboardInterrupt
        scored.append(source)
        return score(scorer, source, *more)

    monkeypatch.chdir(folder)
    monkeypatch.setattr(Scorer, "score", killed)
    flags = ("--extractor", extractor, "--num_samples", 4, "--metrics", "[fid]", "--output", "killed.json")
    arguments = ["--samples", "runs/tiny", *flags, "--guidance_scale", "1.5,2", "--trials", 2, "--precision", "fp32"]
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(parse(evaluate.EvaluateConfig, [str(argument) for argument in arguments]))
    assert not (folder / "killed.json").exists()
    (unfinished,) = folder.glob("killed.json.unfinished-*")
    (row,) = scores(folder, unfinished.name)["rows"]
    assert [trial["frechet_distance[colors]"]["value"] > 0 for trial in row["trials"]] == [True, True]


def test_an_error_after_scoring_loses_no_scores_and_no_commit(folder, extractor, monkeypatch):
    """After hours of scoring, the reference of memorisation was opened, and the code's commit asked for."""
    evaluate, calls = script("evaluate.py"), []
    for name in ("reference", "score"):
        watched = Mock(wraps=getattr(Scorer, name), side_effect=lambda *_, name=name: calls.append(name) or DEFAULT)
        monkeypatch.setattr(Scorer, name, partialmethod(watched))
    monkeypatch.setattr(Scorer, "memorisation", Mock(side_effect=KeyboardInterrupt))
    monkeypatch.setattr("evaluation.scoring.current_commit", lambda: f"after {len(calls)} calls")
    monkeypatch.chdir(folder)
    flags = ("--extractor", extractor, "--num_samples", 10, "--metrics", "[kid]", "--output", "after.json")
    arguments = ["--samples", "runs/tiny", *flags, "--memorisation", "true", "--precision", "fp32"]
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(parse(evaluate.EvaluateConfig, [str(argument) for argument in arguments]))
    assert calls == ["reference", "reference", "score"]
    (unfinished,) = folder.glob("after.json.unfinished-*")
    record = scores(folder, unfinished.name)
    assert "kernel_distance[colors]" in record["scores"]
    assert record["commit"] == "after 0 calls"


def test_of_trials_that_lack_a_number_there_is_no_mean():
    assert row_of("fid", 1.0, 3.0).scores["fid"].value == 2.0
    assert row_of("fid", 1.0, None).scores["fid"].value is None


def test_pictures_and_tables_belong_to_the_record_beside_them(folder, extractor):
    """Those of an earlier record are kept as it is, and so are files of somebody else."""
    flags = ("--samples", "runs/tiny", "--extractor", extractor, "--num_samples", 4, "--metrics", "[fid]")
    flags = (*flags, "--output", "beside.json")
    (folder / "beside.tex").write_text("my paper")
    run("evaluate.py", *flags, "--num_steps", "2,3", "--latex", "true", cwd=folder)
    (paper,) = folder.glob("beside.tex.before-*")
    assert paper.read_text() == "my paper"
    before = {name: (folder / name).read_bytes() for name in ("beside.json", "beside.png", "beside.tex")}
    before["beside-sweep.png"] = (folder / "beside-sweep.png").read_bytes()
    paper.unlink()
    run("evaluate.py", *flags, "--num_steps", 4, cwd=folder)
    assert {path.name for path in folder.glob("beside*") if ".before-" not in path.name} == {
        "beside.json",
        "beside.png",
    }
    for name, content in before.items():
        (kept,) = folder.glob(f"{name}.before-*")
        assert kept.read_bytes() == content
    run("evaluate.py", *flags, "--num_steps", 4, cwd=folder)  # the same once more leaves nothing else
    assert len([*folder.glob("beside*")]) == len(before) + 2


def test_references_of_one_name_are_told_apart_by_their_content(folder, extractor):
    hashes = set()
    for value in (0, 1):
        path = folder / f"reference-{value}" / "reference.npz"
        path.parent.mkdir()
        np.savez(path, arr_0=np.full((4, 32, 32, 3), value, dtype=np.uint8))
        flags = ("--extractor", extractor, "--metrics", "[fid]", "--reference", path, "--data.image_size", 32)
        run("evaluate.py", "--samples", "fixed.npz", *flags, "--output", "of_npz.json", cwd=folder)
        hashes.add(scores(folder, "of_npz.json")["reference"]["source_hash"])
    assert len(hashes) == 2
    assert len([*folder.glob("of_npz.json.before-*")]) == 1
