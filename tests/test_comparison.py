"""scripts/compare.py: scores of several evaluations in one table and one figure."""

import json
from dataclasses import asdict
from itertools import product

import pytest
import torch
from matplotlib.axes import Axes
from mean_colour import MeanColour
from processes import run, script

from evaluation.comparison import check_comparable, combined_rows, read_record, varying_settings
from evaluation.scoring import Row
from experiment.config import SamplingConfig
from metrics.programs import save_program
from metrics.scores import Score

COMPARE = script("scripts/compare.py")
METRICS = ("fid", "precision")
REFERENCE = {"source": "photos", "source_hash": "1", "split": "test-1", "image_size": [8, 8]}


def record_of(name, *values, other=(), num_samples=10, **samples):
    """A record with a row for each value, along model calls, and rows of `other` sources."""
    samples = {"kind": "samples", "guidance_scale": 1.0, **samples}
    rows = [(name, value, {"model_calls": 2**i, "num_steps": 2**i, **samples}) for i, value in enumerate(values)]
    rows += [(other_name, value, {"source": "photos"}) for other_name, value in other]
    rows = [
        {"name": name, "scores": {"fid": asdict(Score(value)), "recall": asdict(Score(0.5))}, "samples": settings}
        for name, value, settings in rows
    ]
    record = {"rows": rows, "num_samples": num_samples, "num_reference": 20, "extractor_sha256": "a"}
    return record | {"settings": {"fid": {}, "recall": {"neighbourhood": 3}}, "reference": REFERENCE}


def saved(folder, name, *values, **settings):
    record = record_of(name, *values, **settings)
    (folder / f"{name}.json").write_text(json.dumps(record))
    return folder / f"{name}.json"


def compare(paths, tmp_path, **settings):
    config = COMPARE.CompareConfig([str(path) for path in paths], output=str(tmp_path / "both"), **settings)
    config.check("--")
    COMPARE.main(config)


def test_samples_named_as_baselines_are_stay_apart_from_them(tmp_path, capsys):
    paths = [saved(tmp_path, "training images", 5.0, other=[("training images", 1.0)]), saved(tmp_path, "run", 4.0)]
    compare(paths, tmp_path)
    rows = [[cell.strip() for cell in line.split("|")[1:3]] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row for row in rows if row] == [
        ["training images", "5.0000"],
        ["run", "4.0000"],
        ["training images", "1.0000"],
    ]


def test_scores_of_a_run_under_two_settings_stand_in_one_table(folder, capsys):
    save_program(MeanColour(), torch.zeros(2, 3, 8, 8, dtype=torch.uint8), folder / "colours.pt2")
    flags = ("--samples", "runs/tiny", "--extractor", "colours.pt2", "--metrics", f"[{','.join(METRICS)}]")
    run("evaluate.py", *flags, "--num_samples", 10, "--guidance_scale", "1,2", "--output", "swept.json", cwd=folder)
    run("evaluate.py", *flags, "--num_samples", 10, "--sampler", "ddim", "--output", "ddim.json", cwd=folder)
    run("evaluate.py", *flags, "--num_samples", 6, "--output", "fewer.json", cwd=folder)
    compare([folder / "swept.json", folder / "ddim.json"], folder, names=["ancestral", "DDIM"])
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[:-1]]
    assert table[0][:4] == ["samples", "sampler", "network_evaluations", "guidance_scale"]
    assert [row[:4] for row in table[2:5]] == [
        ["ancestral", "ddpm", "3", "1.0"],
        ["ancestral", "ddpm", "6", "2.0"],
        ["DDIM", "ddim", "6", "1.5"],
    ]
    first = json.loads((folder / "swept.json").read_text())["rows"][0]["scores"]
    assert float(table[2][4]) == pytest.approx(next(iter(first.values()))["value"], abs=0.01)
    assert r"\toprule" in (folder / "both.tex").read_text()
    assert (folder / "both.pdf").stat().st_size > 1000
    with pytest.raises(ValueError, match=r"fewer\.json: .* do not compare with .* by other samples; .*: 10 and 6"):
        compare([folder / "swept.json", folder / "fewer.json"], folder, names=["a", "b"])


@pytest.fixture
def drawn(monkeypatch):
    """The points of each line of a figure's left part."""
    lines, errorbar = {}, Axes.errorbar

    def watched(axes, x, y, *errors, label, **look):
        lines.setdefault(label, (x, y))
        return errorbar(axes, x, y, *errors, label=label, **look)

    monkeypatch.setattr(Axes, "errorbar", watched)
    return lines


def test_each_evaluation_is_a_line_over_the_calls_of_the_model(tmp_path, drawn):
    paths = [saved(tmp_path, "flow", 9.0, 5.0, 3.0, sampler="euler"), saved(tmp_path, "mean", 4.0, 3.5, sampler="heun")]
    compare(paths, tmp_path)
    assert drawn == {"flow, euler": ([1, 2, 4], [9.0, 5.0, 3.0]), "mean, heun": ([1, 2], [4.0, 3.5])}


def test_a_figure_counts_what_guidance_costs_and_follows_its_axis(tmp_path, drawn):
    swept = record_of("flow", *[4.0, 9.0, 5.0])
    for row, num_steps in zip(swept["rows"], (8, 2, 4), strict=True):
        row["samples"] |= {"num_steps": num_steps, "model_calls": num_steps, "network_evaluations": 2 * num_steps}
        row["samples"]["guidance_scale"] = 1.5
    told = record_of("told", *[6.0, 7.0], guidance_scale=3.0)
    for row, num_steps in zip(told["rows"], (2, 1), strict=True):
        row["samples"] |= {"num_steps": num_steps, "model_calls": num_steps, "network_evaluations": num_steps}
    paths = [tmp_path / "flow.json", tmp_path / "told.json"]
    for path, record in zip(paths, (swept, told), strict=True):
        path.write_text(json.dumps(record))
    compare(paths, tmp_path, along="network_evaluations")
    assert {name.split(",")[0]: line for name, line in drawn.items()} == {
        "flow": ([4, 8, 16], [9.0, 5.0, 4.0]),
        "told": ([1, 2], [7.0, 6.0]),
    }
    table = (tmp_path / "both.tex").read_text()
    assert r"network\_evaluations" in table
    assert r"model\_calls" not in table
    drawn.clear()
    compare([paths[0], saved(tmp_path, "old", 5.0, 6.0)], tmp_path, along="model_calls")
    assert [line[0] for line in drawn.values()] == [[2, 4, 8], [1, 2]]
    with pytest.raises(ValueError, match="--along network_evaluations: a record of an earlier version lacks it"):
        compare([paths[0], tmp_path / "old.json"], tmp_path, along="network_evaluations")


def test_each_spread_is_named_for_what_it_is(tmp_path, capsys):
    spreads = {"a": "standard deviation over 100 subsets", "b": "standard deviation over 3 trials"}
    for name, spread in spreads.items():
        record = record_of(name, 5.0)
        record["rows"][0]["scores"]["fid"] |= {"std": 0.1, "spread": spread}
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    compare([tmp_path / "a.json", tmp_path / "b.json"], tmp_path)
    notes = [f"± of fid: {spread} ({name})" for name, spread in spreads.items()]
    assert "\n".join(notes) in capsys.readouterr().out
    assert (tmp_path / "both.md").read_text().endswith(f"\n\n{notes[0]}\n\n{notes[1]}\n")
    assert (tmp_path / "both.tex").read_text().endswith(f"{{tabular}}\n% {notes[0]}\n% {notes[1]}\n")


def test_each_value_of_a_swept_setting_is_a_line(tmp_path, drawn):
    record = record_of("apg", *[6.0, 5.0, 8.0, 7.0], clip=1.0)
    for row, (parallel, scale) in zip(record["rows"], product((0.0, 1.0), (1.5, 2.0)), strict=True):
        row["samples"] |= {"model_calls": 4, "num_steps": 4, "guidance_parallel": parallel, "guidance_scale": scale}
    (tmp_path / "apg.json").write_text(json.dumps(record))
    compare([tmp_path / "apg.json", saved(tmp_path, "cfg", 9.0, clip=2.0)], tmp_path)
    assert {name.split(",")[0] for name in drawn} == {"apg", "cfg"}
    points = {name.split(", ")[-1]: line for name, line in drawn.items() if name.startswith("apg")}
    assert points == {
        "guidance_parallel 0.0": ([1.5, 2.0], [6.0, 5.0]),
        "guidance_parallel 1.0": ([1.5, 2.0], [8.0, 7.0]),
    }


def test_a_fixed_set_stands_in_the_table_beside_a_sweep(tmp_path, drawn, capsys):
    fixed = record_of("photos", 4.0)
    fixed["rows"][0]["samples"] = {"kind": "folder", "num_images": 10}
    (tmp_path / "photos.json").write_text(json.dumps(fixed))
    compare([saved(tmp_path, "a", 5.0, 6.0), tmp_path / "photos.json"], tmp_path)
    assert drawn == {"": ([1, 2], [5.0, 6.0])}
    assert "not in the figure, as they state no guidance scale or number of calls: photos\n" in capsys.readouterr().out
    assert "| photos" in (tmp_path / "both.md").read_text()


def test_rows_of_real_images_appear_once_and_ceilings_of_two_autoencoders_apart(tmp_path):
    paths = [
        saved(tmp_path, "a", 5.0, other=[("training images", 1.0), ("reconstructions", 2.0)]),
        saved(tmp_path, "b", 6.0, other=[("training images", 1.0), ("reconstructions", 3.0)]),
    ]
    rows = combined_rows([read_record(path) for path in paths], ["a", "b"])
    values = {row.name: row.scores["fid"].value for row in rows}
    assert values == {"a": 5.0, "b": 6.0, "training images": 1.0, "reconstructions": 2.0, "reconstructions, b": 3.0}
    assert varying_settings(rows) == []


@pytest.mark.parametrize("name", [*asdict(SamplingConfig()), "guide_sha256", "spacing_sha256"])
def test_each_setting_of_sampling_is_stated_where_it_differs(name):
    """In the gallery, too. A file of noise levels may change, and a guide be asked without labels."""
    assert varying_settings([Row("a", {}, {name: value}, []) for value in ("one", "other")]) == [name]
    assert script("scripts/gallery.py").scoring_of({"samples": {name: "one"}}) == {name: "one"}


def test_a_table_states_all_that_samples_differ_in(tmp_path):
    codecs = [{"autoencoder": "embedded", "decoder_sha256": sha256} for sha256 in ("0123456789", "abcdefghij")]
    paths = [
        saved(tmp_path, "a", 5.0, labels="balanced", precision="fp32", step=9, autoencoder=codecs[0], clip=None),
        saved(tmp_path, "b", 6.0, labels="reference", precision="bf16", step=10, autoencoder=codecs[1], clip=None),
    ]
    rows = combined_rows([read_record(path) for path in paths], ["a", "b"])
    assert varying_settings(rows) == ["autoencoder", "labels", "precision", "step"]
    assert [row.settings["autoencoder"] for row in rows] == ["embedded (012345)", "embedded (abcdef)"]


def test_files_of_another_comparison_are_kept(tmp_path):
    (tmp_path / "both.tex").write_text("my paper")
    compare([saved(tmp_path, "a", 5.0, 6.0)], tmp_path)
    (kept,) = tmp_path.glob("both.tex.before-*")
    assert kept.read_text() == "my paper"
    compare([saved(tmp_path, "b", 5.0)], tmp_path)  # without a figure
    assert {path.suffix for path in tmp_path.glob("both.*") if ".before-" not in path.name} == {".md", ".tex"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_reference": 21}, "by other reference images: 20 and 21"),
        ({"extractor_sha256": "b"}, "by other extractor"),
        ({"reference": REFERENCE | {"split": "test-2"}}, "by other reference images"),
        ({"settings": {"recall": {"neighbourhood": 5}}}, "by other settings of metrics"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_scores_that_differ_in_more_than_the_samples_are_refused(change, words):
    with pytest.raises(ValueError, match=f"--scores b: its scores do not compare with a, {words}"):
        check_comparable(["a", "b"], [record_of("a", 1.0), record_of("b", 1.0) | change])
    check_comparable(["a", "b"], [record_of("a", 1.0), record_of("b", 1.0) | {"settings": {"kid": {"seed": 0}}}])


def test_mistakes_end_in_a_sentence(tmp_path):
    path = saved(tmp_path, "a", 1.0)
    (tmp_path / "empty").mkdir()
    (tmp_path / "other.json").write_text('{"rows": 3}')
    mistakes = {
        "name the evaluations to compare": ([], {}),
        "2 for 1 scores": ([path], {"names": ["x", "y"]}),
        "several are of a; tell them apart by --names": ([path, path], {}),
        "nothing.json: no such file": ([tmp_path / "nothing.json"], {}),
        "scores.json: not found; `python evaluate.py --samples": ([tmp_path / "empty"], {}),
        "not a file of scores that evaluate.py has written": ([tmp_path / "other.json"], {}),
    }
    for words, (paths, settings) in mistakes.items():
        with pytest.raises(ValueError, match=words):
            compare(paths, tmp_path, **settings)
    assert not list(tmp_path.glob("both*"))
