"""Trackers and logged pictures of a training, which never stop it."""

import json
import time
from types import SimpleNamespace
from unittest.mock import Mock

import torch
from accelerate import Accelerator
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sampling.grids import save_grid
from training.curves import draw_curve, draw_progress, label_by_numbers
from training.log import Log, end_training


def test_pictures_that_cannot_be_drawn_are_reported(tmp_path, capsys):
    run = tmp_path / r"$\bad_{name$"
    save_grid(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), run / "samples" / "00000002.png", columns=2)
    Image.new("RGB", (8, 8)).save(run / "samples" / "00000001 copy.png")  # no grid of the run's
    cut = (run / "samples" / "00000002.png").read_bytes()
    (run / "samples" / "00000003.png").write_bytes(cut[: len(cut) // 2])
    Image.new("RGB", (8, 8)).save(run / "samples" / "00000004.png", "EPS")
    draw_progress(run)
    with Image.open(run / "progress.png") as picture:
        assert picture.height == 134  # of the one that can be read
    told = capsys.readouterr().out.splitlines()
    assert [line.split(".png")[0][-13:] for line in told] == ["ples/00000003", "ples/00000004"]

    (run / "log.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0}) + "\n")
    draw_curve(run)
    assert (run / "loss.png").is_file()
    assert capsys.readouterr().out == ""
    (run / "log.jsonl").write_text(json.dumps({"step": 1, "loss": "high"}) + "\n")
    draw_curve(run)
    assert capsys.readouterr().out.startswith("warning: loss.png is left out: ")


def test_the_progress_of_a_long_training_takes_no_longer_than_that_of_a_short_one(tmp_path):
    """All grids were drawn anew with each, minutes at 256 pixels after some hundred of them."""
    for step in range(1, 122):
        grid = torch.full((1, 3, 64, 64 * (1 + 20 * (step == 121))), step, dtype=torch.uint8)
        save_grid(grid, tmp_path / "samples" / f"{step:08d}.png", columns=1)
    draw_progress(tmp_path)
    with Image.open(tmp_path / "progress.gif") as moving, Image.open(tmp_path / "progress.png") as picture:
        assert moving.n_frames == 50
        assert picture.width == 1080
        assert [picture.getpixel((90, 20 + 66 * row))[0] for row in (0, 8)] == [1, 109]


def test_scores_of_a_training_have_panels_beside_the_loss(tmp_path):
    events = [{"step": step, "loss": 1 / step, "lr": 0.1, "images_per_second": 3.0} for step in (1, 2, 3)]
    widths = []
    for scores in ({}, {"frechet_distance[x]": 9.0, "frechet_distance[x], halves": 8.0, "precision": 0.5}):
        lines = [{**event, **(scores if event["step"] > 1 else {})} for event in events]
        (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        draw_curve(tmp_path)
        with Image.open(tmp_path / "loss.png") as picture:
            widths.append(picture.width)
    assert widths == [900, 1800]


def test_ticks_of_a_loss_that_hardly_falls_are_told_apart():
    axes = Figure().subplots()
    axes.plot([0, 1], [0.391, 0.295])
    axes.set_yscale("log")
    label_by_numbers(axes.yaxis)
    axes.figure.draw_without_rendering()
    labels = [text for label in axes.yaxis.get_ticklabels(which="both") if (text := label.get_text())]
    assert len(set(labels)) == len(labels) >= 4


def test_a_broken_line_of_the_log_is_named_and_left_out(tmp_path, capsys):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo\n{"step": 3}\n[4]\n{"step": 9}\n')
    log = Log(tmp_path, Accelerator(cpu=True), {}, step=5)
    assert log.path.read_text() == '{"step": 1}\n{"step": 3}\n'
    told = capsys.readouterr().out.splitlines()
    assert [line.partition(" is broken")[0] for line in told] == [f"warning: {log.path}: line {n}" for n in (2, 4)]


def test_a_tracker_that_fails_stops_no_training(tmp_path, capsys):
    """That of wandb is a process of its own, and tensorboard's thread fails on a full disk."""
    failing = Mock(side_effect=BrokenPipeError("gone"))
    accelerator = Accelerator(cpu=True)
    log = Log(tmp_path, accelerator, {})
    accelerator.trackers = [SimpleNamespace(log=failing, finish=failing, name="wandb")]
    log.write(1, loss=0.5)
    end_training(accelerator)
    assert json.loads((tmp_path / "log.jsonl").read_text()) == {"step": 1, "loss": 0.5}
    said = ["step 1 in a tracker is left out: gone", "the end of a tracker is left out: gone"]
    assert capsys.readouterr().out.splitlines() == [f"warning: {words}" for words in said]


def test_steps_that_are_taken_again_replace_those_before_in_tensorboard(tmp_path):
    for gone_on_from, steps, loss in ((0, (1, 2, 3, 4), 2.0), (2, (3, 5), 1.0)):
        accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=tmp_path)
        log = Log(tmp_path, accelerator, {}, gone_on_from)
        for step in steps:
            log.write(step, loss=loss)
        accelerator.end_training()
        if not gone_on_from:
            time.sleep(1.1)  # files of events are read in the order of their names, which count seconds
    board = EventAccumulator(str(tmp_path / "tracking")).Reload()
    assert [(scalar.step, scalar.value) for scalar in board.Scalars("loss")] == [(1, 2), (2, 2), (3, 1), (5, 1)]


def test_steps_that_a_rollback_repeats_replace_those_before_in_tensorboard(tmp_path):
    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=tmp_path)
    log = Log(tmp_path, accelerator, {})
    for step in (1, 2, 3, 4):
        log.write(step, loss=2.0)
    log.roll_back(2, rollbacks=1)
    for step in (3, 5):
        log.write(step, loss=1.0)
    accelerator.end_training()
    board = EventAccumulator(str(tmp_path / "tracking")).Reload()
    assert [(scalar.step, scalar.value) for scalar in board.Scalars("loss")] == [(1, 2), (2, 2), (3, 1), (5, 1)]
