import errno
import os
import shutil
import stat
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors import SafetensorError
from saved_checkpoints import SPEC, objects, save, save_trained, state, train_a_step

from checkpoints.averages import EMA
from checkpoints.checkpoint import current_commit, open_checkpoint, read_metadata, read_tensors, save_tensors
from checkpoints.training_state import resume
from checkpoints.warm_start import warm_start
from experiment.config import EvaluationConfig, ExperimentConfig, LogConfig, SamplingConfig
from machine.accelerator import open_accelerator
from machine.checkpoint_folder import (
    Best,
    CheckpointError,
    checkpoint_to_resume,
    list_checkpoints,
    mark_best,
    newest_intact,
    rotate,
)
from models import ModelSpec
from training.guard import Guard
from training.inspection import measured_by, open_best


@pytest.fixture
def saved(tmp_path):
    return save_trained(tmp_path)


def test_weights_file_alone_brings_the_model_back(saved, tmp_path):
    folder, (_, ema, _) = saved
    lone = shutil.copy(folder / "ema.safetensors", tmp_path / "lone.safetensors")
    checkpoint = open_checkpoint(lone)
    assert (checkpoint.step, checkpoint.classes, checkpoint.spec) == (1, ["a", "b", "c"], SPEC)
    assert checkpoint.config == ExperimentConfig()
    state = torch.get_rng_state()
    loaded = checkpoint.load_model().state_dict()
    assert torch.equal(torch.get_rng_state(), state)  # a training with a guide begins as one without
    assert all(torch.equal(loaded[name], tensor) for name, tensor in ema.model.state_dict().items())


def test_a_relative_path_of_an_autoencoder_is_resolved_from_the_runs_folder(saved, tmp_path, monkeypatch):
    checkpoint = open_checkpoint(saved[0])
    of_own = replace(checkpoint, config=replace(checkpoint.config, autoencoder="runs/own/autoencoder"))
    folder = checkpoint.run.parent / "runs" / "own" / "autoencoder"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert Path(of_own.autoencoder) == folder.resolve()
    assert replace(of_own, config=checkpoint.config).autoencoder == checkpoint.config.autoencoder
    monkeypatch.chdir(checkpoint.run.parent)
    assert of_own.autoencoder == "runs/own/autoencoder"


def test_the_same_weights_and_metadata_are_the_same_file(tmp_path):
    weights = {"b": torch.arange(3.0), "a": torch.ones(2, 2).half(), "ä": torch.tensor(1)}
    metadata = {f"key {number}": 'ü 🙂 "\\/\n\x01\x7f' for number in range(8)}
    files = [tmp_path / f"{number}.safetensors" for number in range(8)]
    for path in files:
        save_tensors(weights, path, metadata)
    assert len({path.read_bytes() for path in files}) == 1  # the library's own order would agree once in 40320 ** 7
    assert metadata.items() <= read_metadata(files[0]).items()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in read_tensors(files[0]).items())


def test_run_folder_means_its_newest_checkpoint(saved, tmp_path):
    folder, trained = saved
    save(folder.parent, 10, *trained)
    assert open_checkpoint(tmp_path / "run").step == 10
    assert open_checkpoint(folder).step == 1


def test_resuming_restores_everything(saved):
    folder, trained = saved
    fresh, guard = objects(), Guard()
    progress = resume(checkpoint_to_resume(folder.parent.parent), state(*fresh, **{"guard.model": guard}))
    assert (progress["step"], guard.skipped) == (1, 3)
    for ours, theirs in zip(fresh, trained, strict=True):
        ours, theirs = (x.model if isinstance(x, EMA) else x for x in (ours, theirs))
        if isinstance(ours, torch.nn.Module):
            assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    torch.manual_seed(1)
    train_a_step(*fresh)
    torch.manual_seed(1)
    train_a_step(*trained)
    assert all(torch.equal(a, b) for a, b in zip(fresh[0].parameters(), trained[0].parameters(), strict=True))


def test_old_checkpoints_are_deleted(saved):
    folder, trained = saved
    for step in (2, 3):
        save(folder.parent, step, *trained)
    assert [path.name for path in list_checkpoints(folder.parent)] == ["00000002", "00000003"]


def test_periodic_and_best_checkpoints_are_kept(saved):
    folder, trained = saved
    mark_best(folder.parent, 1)
    for step in range(2, 9):
        save(folder.parent, step, *trained, keep=1, keep_every=3)
    assert [int(path.name) for path in list_checkpoints(folder.parent)] == [1, 3, 6, 8]
    assert open_checkpoint(folder.parent / "best").step == 1
    mark_best(folder.parent, 6)
    assert open_checkpoint(folder.parent / "best").step == 6


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "optimizer.safetensors has another checksum"),
        (lambda path: path.unlink(), "optimizer.safetensors is missing"),
        (lambda path: (path.parent.parent / "checksums.json").unlink(), "checksums.json is missing"),
    ],
)
def test_damaged_checkpoints_are_named_and_passed_over(saved, capsys, spoil, message):
    folder, trained = saved
    newer = save(folder.parent, 2, *trained)
    spoil(newer / "state" / "optimizer.safetensors")
    assert newest_intact(folder.parent) == folder
    told = capsys.readouterr().out
    assert message in told
    assert str(newer) in told


def test_a_checkpoint_that_cannot_be_read_for_a_moment_is_not_taken_for_damaged(saved, monkeypatch):
    """Else the training would go on from an earlier one, and delete what was logged and drawn since."""
    folder, trained = saved
    newer = save(folder.parent, 2, *trained)
    with monkeypatch.context() as moment:
        moment.setattr(Path, "read_text", Mock(side_effect=OSError("Input/output error")))
        with pytest.raises(OSError, match="Input/output error"):
            newest_intact(folder.parent)
        rotate(folder.parent, keep=1)
    assert newest_intact(folder.parent) == newer
    assert list_checkpoints(folder.parent) == [folder, newer]


def test_what_a_kill_left_behind_is_cleared(saved):
    folder, trained = saved
    (folder.parent / ".00000007.partial" / "state").mkdir(parents=True)
    assert checkpoint_to_resume(folder.parent.parent) == folder
    save(folder.parent, 2, *trained)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["00000001", "00000002"]


def test_warm_start_takes_what_fits_and_lists_what_does_not(saved):
    folder, (_, ema, _) = saved
    other = ModelSpec("DiT", {"dim": 16, "depth": 3, "num_heads": 2}, (4, 4), 4, 8, 7).build()
    told = warm_start(other, str(folder))
    assert "of another shape: cond.label.weight" in told
    assert "not in the checkpoint: blocks.2." in told
    assert torch.equal(other.blocks[1].mlp.fc1.weight, ema.model.blocks[1].mlp.fc1.weight)
    with pytest.raises(CheckpointError, match="no weight of it has the name and shape"):
        warm_start(torch.nn.Linear(2, 2), str(folder))


def test_warm_start_takes_the_labels_of_classes_of_the_same_name(saved):
    """With as many classes but other ones, labels used to be taken over from the wrong classes."""
    folder, (_, ema, _) = saved
    known = open_checkpoint(folder).classes
    classes = ["unheard of", known[2], known[0]]
    fresh = ModelSpec("DiT", {"dim": 16, "depth": 2, "num_heads": 2}, (4, 4), 4, 8, 3).build()
    before, theirs = fresh.cond.label.weight.clone(), ema.model.cond.label.weight
    assert warm_start(fresh, str(folder), classes).endswith("; 2 of 3 classes keep their label embeddings")
    assert torch.equal(fresh.cond.label.weight, torch.stack([before[0], theirs[2], theirs[0], theirs[-1]]))
    save_tensors(ema.model.state_dict(), folder.parent / "nameless.safetensors", {})
    assert "keep their label embeddings" not in warm_start(fresh, str(folder.parent / "nameless.safetensors"), classes)
    assert torch.equal(fresh.cond.label.weight, theirs)


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "make room"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "make room"),
        (OSError(errno.EACCES, os.strerror(errno.EACCES)), "fix that"),
    ],
)
def test_failed_save_leaves_the_last_checkpoint_alone(saved, monkeypatch, error, remedy):
    folder, trained = saved
    monkeypatch.setattr("checkpoints.training_state.save_file", Mock(side_effect=error))
    with pytest.raises(OSError, match=rf"could not be written .*{remedy} and --resume"):
        save(folder.parent, 2, *trained)
    assert [path.name for path in folder.parent.iterdir()] == ["00000001"]


def test_a_file_system_that_cannot_flush_folders_takes_checkpoints(saved, monkeypatch):
    folder, trained = saved
    fsync = os.fsync

    def flush(file):
        if stat.S_ISDIR(os.fstat(file).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(file)

    monkeypatch.setattr(os, "fsync", flush)
    assert save(folder.parent, 2, *trained) == newest_intact(folder.parent)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("stale file handle")])
def test_an_interrupted_overwrite_keeps_the_checkpoint_of_the_same_step(saved, monkeypatch, error):
    """The save is killed, or fails, between its two renames."""
    folder, trained = saved
    rename, renames = Path.rename, []

    def second_fails(path, target):
        renames.append(path)
        if len(renames) == 2:
            raise error
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", second_fails)
    with pytest.raises((KeyboardInterrupt, OSError)):
        save(folder.parent, 1, *trained)
    assert checkpoint_to_resume(folder.parent.parent) == folder
    save(folder.parent, 1, *trained)
    assert [path.name for path in folder.parent.iterdir()] == ["00000001"]


def test_what_cannot_be_removed_loses_nothing(saved, monkeypatch):
    """Files that others hold open on a network file system cannot be removed."""
    folder, trained = saved
    before = (folder / "ema.safetensors").stat().st_ino
    with monkeypatch.context() as patched:
        patched.setattr(os, "unlink", Mock(side_effect=OSError(errno.EBUSY, "busy")))
        save(folder.parent, 1, *trained)
        save(folder.parent, 2, *trained, keep=1)
    assert [path.name for path in list_checkpoints(folder.parent)] == ["00000002"]
    assert (folder.parent / "00000002" / "ema.safetensors").stat().st_ino != before
    save(folder.parent, 3, *trained)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["00000002", "00000003"]


def test_rotation_counts_whole_checkpoints_alone(saved):
    folder, trained = saved
    for step in (2, 3):
        save(folder.parent, step, *trained, keep=9)
        spoiled = folder.parent / f"{step:08d}" / "state" / "progress.json"
        spoiled.write_text(spoiled.read_text()[:-1])
    (folder.parent / "00000002.bak").mkdir()
    (folder.parent / "2").touch()
    save(folder.parent, 4, *trained, keep=2)
    assert [int(path.name) for path in list_checkpoints(folder.parent)] == [1, 2, 3, 4]
    save(folder.parent, 5, *trained, keep=2)
    assert [int(path.name) for path in list_checkpoints(folder.parent)] == [4, 5]
    assert (folder.parent / "00000002.bak").is_dir()
    with pytest.raises(ValueError, match=r"--log.keep_checkpoints -1 must be at least 1"):
        save(folder.parent, 6, *trained, keep=-1)
    assert checkpoint_to_resume(folder.parent.parent).name == "00000006"


def test_checkpoints_are_ordered_by_number(tmp_path):
    for name in ("100000000", "99999999"):
        (tmp_path / name).mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["99999999", "100000000"]


def test_the_best_is_the_lowest_or_the_highest_as_the_metric_has_it():
    config, score = LogConfig(best="precision", evaluate_every=5), EvaluationConfig(extractor="colors.pt2")
    for name, kept in {"precision": 2, "frechet_distance[colors]": 1, "classifier_score[colors]": 2}.items():
        best = open_best(replace(config, best=name), score)
        for step, value in enumerate((0.2, 0.1, 0.3)):
            best.improves(value, step)
        assert best.step == kept
    for best, words in {"fid": "there are validation_loss, frechet_distance.colors", "loss": "not measured"}.items():
        with pytest.raises(ValueError, match=f"--log.best {best}: .*{words}"):
            open_best(replace(config, best=best), score)
    with pytest.raises(ValueError, match=r"--log\.best recall: it is never measured; set --log.evaluate_every"):
        open_best(LogConfig(best="recall"), score)


def test_a_value_that_another_extractor_has_measured_is_not_the_best():
    """A classifier may be trained again to the same file, between two parts of a training."""
    state = Best("fid", value=1.0, step=3, measured_by="one").state()
    for extractor, value in {"one": 1.0, "another": None}.items():
        best = Best("fid", measured_by=extractor)
        best.restore(state)
        assert (best.value, best.step) == (value, 3)


def test_what_measures_a_score_is_its_extractor_its_guide_and_a_file_of_noise_levels(saved, tmp_path):
    (spacing := tmp_path / "levels.txt").write_text("1 0.5")

    def measure(**sampling):
        return measured_by("one", SamplingConfig(**sampling), open_accelerator("fp32"))

    assert measure(spacing="karras") == "one"
    hashes = {"one", measure(spacing=str(spacing)), measure(guidance_checkpoint=str(saved[0]))}
    spacing.write_text("1 0.4")
    assert len({*hashes, measure(spacing=str(spacing))}) == 4


def test_results_of_older_or_other_weights_are_marked_with_their_name(saved, tmp_path):
    """Scores and samples of a snapshot's average once replaced the run's own, and were published as such."""
    folder, _ = saved
    runs = folder.parent.parent
    for name in ("00000098", "00000099"):
        shutil.copytree(folder, runs / "marked" / "checkpoints" / name)
    run = runs / "marked"
    shutil.copy(folder / "ema.safetensors", run / "ema-0.08.safetensors")
    older = run / "checkpoints" / "00000098"
    found = [
        open_checkpoint(path).output_suffix
        for path in (run, older, older / "ema.safetensors", run / "ema-0.08.safetensors")
    ]
    assert found == ["", "-00000098", "-00000098", "-ema-0.08"]
    (run / "checkpoints" / "best").symlink_to("00000099")
    assert open_checkpoint(run / "checkpoints" / "best").output_suffix == open_checkpoint(folder).output_suffix == ""
    shutil.copy(folder / "ema.safetensors", tmp_path / "0.1.safetensors")  # beside others, outside of any run
    assert open_checkpoint(tmp_path / "0.1.safetensors").output_suffix == "-0.1"


def test_the_commit_is_that_of_the_code_and_empty_without_git(tmp_path, monkeypatch):
    """Records are written after hours of scoring; a hook of another repository says where that is."""
    here = current_commit()
    monkeypatch.setenv("GIT_DIR", str(tmp_path))
    assert current_commit() == here
    monkeypatch.setenv("PATH", str(tmp_path))
    assert current_commit() == ""
