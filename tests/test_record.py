"""Records of scores: which of them replace an earlier one, and which are kept beside it."""

import json

import pytest

from evaluation.record import remove_unfinished, unfinished_path, write_json, write_unfinished


def test_scores_of_more_images_are_kept(tmp_path, capsys):
    path, record = tmp_path / "scores.json", {"num_samples": 50_000, "num_trials": 1}
    write_json(record, path)
    write_json({"num_samples": 50_000, "num_trials": 3}, path)  # as many and more
    assert [file.name for file in tmp_path.iterdir()] == ["scores.json"]
    write_json({"num_samples": 10, "num_trials": 1}, path)
    kept = next(tmp_path.glob("scores.json.before-*"))
    assert json.loads(kept.read_text())["num_trials"] == 3
    assert json.loads(path.read_text())["num_samples"] == 10
    assert f"{path} was of more images, and is now {kept}" in capsys.readouterr().out


BASIC = {"num_samples": 9, "num_trials": 1, "extractor_sha256": "e", "reference": {"source": "a", "features": "x"}}
SCORES = {"fid": {"value": 1.0}, "kid": {"value": 2.0}}
ROW = {"name": "run", "scores": SCORES, "samples": {"guidance_scale": 2.0, "weights_sha256": "w"}}


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"num_samples": 10, "reference": {"source": "a", "features": "y"}, "memorisation": {}}, None),
        (
            {"rows": [{**ROW, "scores": {**SCORES, "recall": {"value": 0.5}}, "trials": []}, {**ROW, "name": "floor"}]},
            None,
        ),
        ({"rows": [{**ROW, "samples": {**ROW["samples"], "guidance_scale": 1.5}}]}, "other samples"),
        ({"rows": [{**ROW, "samples": {**ROW["samples"], "weights_sha256": "x"}}]}, "other samples"),
        ({"rows": [{**ROW, "scores": {"fid": SCORES["fid"]}}]}, "more scores"),
        ({"rows": [{**ROW, "scores": {**SCORES, "kid": {"value": None}}}]}, "more scores"),
        ({"likelihood": None}, "more scores"),
        ({"num_samples": 3, "num_trials": 3, "rows": [{**ROW, "trials": [{}] * 3}]}, "more images"),
        ({"reference": {"source": "b"}}, "another reference"),
        ({"reference": {"source": "a", "source_hash": "of another npz of that name"}}, "another reference"),
        ({"extractor_sha256": "f"}, "another extractor"),
        ({"evaluation": {"seed": 1}}, "another seed"),
        ({"bits_per_dimension": {"num_images": 2}}, "the likelihood of more images"),
        ({"perceptual": {"name": "p", "sha256": "q"}}, "another perceptual distance"),
    ],
)
def test_scores_are_replaced_by_nothing_else_than_the_same(tmp_path, capsys, changes, what):
    path, record = tmp_path / "scores.json", {**BASIC, "rows": [ROW], "likelihood": {"clip": float("inf")}}
    record |= {"evaluation": {"seed": 0}, "bits_per_dimension": {"num_images": 64}}
    record |= {"perceptual": {"name": "p", "sha256": "p"}}
    write_json(record, path)
    write_json({name: value for name, value in {**record, **changes}.items() if value is not None}, path)
    kept = list(tmp_path.glob("scores.json.before-*"))
    assert [f"{path} was of {what}, and is now {file}\n" for file in kept] == [capsys.readouterr().out] * bool(what)
    assert len(kept) == bool(what)


def test_what_a_killed_process_has_scored_is_kept_until_there_is_more(tmp_path):
    path = tmp_path / "scores.json.unfinished"
    records = [{**BASIC, "rows": [ROW, {**ROW, "name": "floor", "trials": [{}] * number}]} for number in (1, 2, 3)]
    for written, expected in ((1, 1), (0, 1), (1, 1), (2, 2)):
        write_unfinished(records[written], path)
        assert json.loads(path.read_text()) == records[expected]
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_what_a_killed_process_has_scored_outlives_another_that_scores_less(tmp_path):
    path, sweep = tmp_path / "scores.json.unfinished", {**BASIC, "rows": [ROW, {**ROW, "name": "floor"}]}
    for less in ({**sweep, "rows": [ROW]}, {**sweep, "num_samples": 3}):
        write_unfinished(sweep, path)
        write_unfinished(less, path)
        remove_unfinished(less, tmp_path / "scores.json")
        assert json.loads(path.read_text()) == sweep
    remove_unfinished({**sweep, "memorisation": {}}, tmp_path / "scores.json")
    assert not any(tmp_path.iterdir())


def test_evaluations_at_the_same_time_leave_each_others_files_alone(tmp_path, capsys):
    """Two sweeps of one run write what they have scored in turn; the one that ends first removes its own file alone."""
    output, sweeps = tmp_path / "scores.json", {}
    for scale in (1.5, 2.0):
        rows = [{**ROW, "samples": {"guidance_scale": scale + number}} for number in range(3)]
        sweeps[unfinished_path(output, f"--guidance_scale {scale}")] = [{**BASIC, "rows": rows[:n]} for n in (1, 2, 3)]
    for number in range(2):
        for path, records in sweeps.items():
            write_unfinished(records[number], path)
            assert json.loads(path.read_text()) == records[number]
    (first, records), (second, _) = sweeps.items()
    write_json(records[2], output)
    remove_unfinished(records[2], output)
    assert {path.name for path in tmp_path.iterdir()} == {output.name, second.name}
    assert first.name.startswith("scores.json.unfinished-")
    assert not capsys.readouterr().out


def test_a_file_of_somebody_else_is_kept(tmp_path):
    for text in ("my notes", "[1]", '{"num_samples": "many"}', '{"num_samples": 1}', json.dumps({**BASIC, "rows": 3})):
        path = tmp_path / f"{len(text)}.json"
        path.write_text(text)
        write_json(BASIC, path)
        assert next(tmp_path.glob(f"{path.name}.before-*")).read_text() == text
        assert json.loads(path.read_text()) == BASIC
