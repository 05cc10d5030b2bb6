"""Guards of a training: skipped steps, rollbacks, averages between log lines, signals."""

import gc
import json
import math
import os
import signal
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from processes import run

from machine import accelerator as machine
from machine.stopping import SIGNALS, exit_on_signal, without_garbage_collection
from training.guard import Guard, TrainingDivergedError, clip_gradients
from training.interruption import Interruption, Stopped
from training.meter import Meter


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


def test_steps_that_are_not_finite_are_counted_and_then_rolled_back():
    guard = Guard(patience=3, max_rollbacks=1)
    assert guard.passes(1.0)
    assert [guard.passes(float("nan")), guard.passes(float("inf"))] == [False, False]
    assert not guard.must_roll_back(has_checkpoint=True)
    assert guard.passes(2.0)  # one good step: the count of those in a row begins anew
    assert guard.in_a_row == 0
    for _ in range(3):
        guard.passes(float("nan"))
    assert guard.must_roll_back(has_checkpoint=True)
    assert (guard.skipped, guard.rollbacks) == (5, 1)
    for _ in range(3):
        guard.passes(float("nan"))
    with pytest.raises(TrainingDivergedError, match="after 1 returns to the last checkpoint"):
        guard.must_roll_back(has_checkpoint=True)


def test_without_a_checkpoint_there_is_nothing_to_go_back_to():
    guard = Guard(patience=1)
    guard.passes(float("nan"))
    with pytest.raises(TrainingDivergedError, match=r"lower --optim.lr"):
        guard.must_roll_back(has_checkpoint=False)


def test_restoring_a_checkpoint_keeps_the_count_of_rollbacks():
    guard = Guard(rollbacks=2)
    guard.restore({"skipped": 1, "in_a_row": 0, "rollbacks": 0})
    assert guard.state() == {"skipped": 1, "in_a_row": 0, "rollbacks": 2}


@pytest.mark.parametrize("max_norm", [0.0, 1.0])
def test_gradient_norm_and_its_clip(accelerator, max_norm):
    layer = torch.nn.Linear(2, 1, bias=False)
    layer.weight.grad = torch.tensor([[3.0, 4.0]])
    assert clip_gradients(accelerator, layer, max_norm).tolist() == pytest.approx([5])
    assert layer.weight.grad.norm() == pytest.approx(max_norm or 5)


def test_a_step_counts_as_clipped_if_a_part_of_it_was(accelerator):
    """Model and heads are clipped each for itself: of norms (0.6, 0.8), which are 1 together, neither is."""
    meter, layers = Meter(accelerator), [torch.nn.Linear(1, 1, bias=False) for _ in range(2)]
    for gradients, after in (((0.6, 0.8), (0.6, 0.8)), ((0.3, 1.2), (0.3, 0.9))):
        for layer, gradient in zip(layers, gradients, strict=True):
            layer.weight.grad = torch.tensor([[gradient]])
        meter.add({"loss": torch.ones(1)})
        meter.step(clip_gradients(accelerator, layers[0], 0.9, layers[1]).tolist(), 0.9, 1)
        assert [layer.weight.grad.item() for layer in layers] == pytest.approx(after, rel=1e-5)
    means = meter.summary()
    assert means["clipped"] == 0.5
    assert means["gradient_norm"] == pytest.approx((1 + math.hypot(0.3, 1.2)) / 2)


def test_meter_means_by_term_and_quarter_without_skipped_steps(accelerator):
    meter = Meter(accelerator)
    meter.add({"loss": torch.tensor([1.0, 3.0]), "mse": torch.tensor([0.5, 0.5])}, torch.tensor([0, 0.999]))
    meter.step([2.0], 1.0, 2)
    meter.add({"loss": torch.tensor([float("nan")] * 2), "mse": torch.zeros(2)}, torch.tensor([0, 0]))
    meter.skip()
    meter.add({"loss": torch.tensor([5.0, 7.0]), "mse": torch.tensor([0.5, 1.5])}, torch.tensor([0.01, 0.6]))
    meter.step([0.5], 1.0, 2)
    means = meter.summary()
    assert means["loss"] == pytest.approx(4)
    assert means["mse"] == pytest.approx(0.75)
    assert [means.get(f"loss_quarter_{n}") for n in (1, 2, 3, 4)] == [3, None, 7, 3]
    assert (means["gradient_norm"], means["clipped"]) == (1.25, 0.5)
    assert means["memory_gb"] > 0.01


def test_the_meter_resumes_from_a_checkpoint(accelerator):
    straight, cut = Meter(accelerator), Meter(accelerator)
    for number in range(4):
        for meter in (straight, cut):
            meter.add({"loss": torch.tensor([0.1 * number, 1 / 3])}, torch.tensor([0, 0.5]))
            meter.step([number / 3], 0.0, 2)
        if number == 1:
            state = cut.state()
            cut = Meter(accelerator)
            cut.restore(state)
    measured = {"images_per_second", "waiting_for_data", "memory_gb"}
    one, other = (meter.summary() for meter in (straight, cut))
    assert {name: one[name] for name in one if name not in measured} == {
        name: other[name] for name in other if name not in measured
    }


def test_speed_is_that_of_steps_since_a_training_began_or_was_resumed(accelerator, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("training.meter.time", SimpleNamespace(perf_counter=lambda: now[0]))

    def two_steps(meter):
        for _ in range(2):
            meter.add({"loss": torch.ones(8)})
            meter.step([1.0], 0.0, 8)
        now[0] += 2.0

    meter = Meter(accelerator)
    now[0] += 1000.0  # images are encoded
    meter.start()
    two_steps(meter)
    assert meter.summary()["images_per_second"] == 8.0
    resumed = Meter(accelerator)
    resumed.restore(json.loads(json.dumps(meter.state())))
    now[0] += 1000.0
    resumed.start()
    two_steps(resumed)
    summary = resumed.summary()
    assert (summary["images_per_second"], summary["loss"]) == (8.0, 1.0)


def test_each_process_resumes_with_its_own_sums(accelerator, monkeypatch):
    state = {"shares": {"loss": [1.0, 2.0]}, "norms": [1.0], "num_clipped": 0, "num_images": 4}

    def restored(rank, num_processes, state):
        monkeypatch.setattr(Accelerator, "process_index", rank)
        monkeypatch.setattr(Accelerator, "num_processes", num_processes)
        meter = Meter(accelerator)
        meter.restore(state)
        return meter.sums["loss"]

    assert [restored(rank, 2, state) for rank in range(2)] == [1, 2]
    assert [restored(rank, 3, state) for rank in range(3)] == [3, 0, 0]
    del state["shares"]
    assert restored(0, 1, {**state, "sums": {"loss": 3.0}}) == 3


@pytest.mark.parametrize("number", SIGNALS)
def test_signals_become_a_reason(accelerator, tmp_path, number):
    with Interruption(tmp_path, accelerator, None) as interruption:
        assert interruption.reason(1, 10) is None
        os.kill(os.getpid(), number)
        assert interruption.reason(2, 10) == signal.Signals(number).name


AGREED = """
import signal
from pathlib import Path
import torch
from machine.accelerator import open_accelerator
from training.interruption import Interruption

accelerator = open_accelerator("fp32")
for hours, received, reason in ((1.0, 0, None), (1e-12, 0, "--train.max_hours 1e-12 is over"), (1e-12, 15, "SIGTERM")):
    interruption = Interruption(Path("."), accelerator, hours)
    interruption.received = received * accelerator.process_index
    for due in (True, False):  # by the main process's clock, whatever the others' says; who stops saves anyhow
        assert interruption.synchronize(torch.tensor([0.5]), save_due=due == accelerator.is_main_process) == [0.5]
        assert interruption.save_due == due or reason == "SIGTERM"
        assert interruption.reason(1, 10) == reason
"""


def test_several_processes_agree_with_the_step_on_whether_to_stop_or_save(tmp_path):
    (tmp_path / "agreed.py").write_text(AGREED)
    run(tmp_path / "agreed.py", cwd=tmp_path, processes=2)


def test_nothing_is_saved_while_steps_are_skipped_nor_with_ruined_weights(accelerator):
    guard, model = Guard(patience=3), torch.nn.BatchNorm1d(2)
    assert guard.may_save(accelerator, model)
    guard.passes(float("nan"))
    assert not guard.may_save(accelerator, model)
    assert guard.may_save(accelerator, model, last=True)
    guard.passes(1.0)
    model.running_mean[0] = float("nan")
    assert not guard.may_save(accelerator, model)
    assert guard.must_roll_back(has_checkpoint=True)
    with pytest.raises(TrainingDivergedError, match="after the last step weights are not finite"):
        guard.may_save(accelerator, model, last=True)


def test_time_that_is_over_is_a_reason(accelerator, tmp_path):
    assert Interruption(tmp_path, accelerator, 10.0).reason(1, 10) is None
    assert Interruption(tmp_path, accelerator, 1e-12).reason(1, 10) == "--train.max_hours 1e-12 is over"


def test_a_signal_before_the_first_step_stops_at_once(accelerator, tmp_path):
    (tmp_path / "stopped").write_text("of the run before")
    interruption = Interruption(tmp_path, accelerator, None).__enter__()
    assert not (tmp_path / "stopped").exists()
    with pytest.raises(Stopped) as stopped:
        os.kill(os.getpid(), signal.SIGHUP)
    with pytest.raises(SystemExit) as ended:
        interruption.__exit__(Stopped, stopped.value, None)
    assert ended.value.code == 75
    why = "SIGHUP: stopped before the first step; run it again with --resume auto\n"
    assert (tmp_path / "stopped").read_text() == why


def test_a_signal_while_libraries_are_imported_stops_too(tmp_path):
    if (child := os.fork()) == 0:
        with exit_on_signal(tmp_path):
            os.kill(os.getpid(), signal.SIGTERM)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 75
    assert (tmp_path / "stopped").read_text().startswith("SIGTERM: stopped before the first step; run it again")


def test_the_garbage_collector_rests_while_libraries_are_imported_and_goes_on():
    with without_garbage_collection():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ImportError), without_garbage_collection():
        raise ImportError
    assert gc.isenabled()


def test_a_run_under_nohup_survives_a_closed_terminal(accelerator, tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Interruption(tmp_path, accelerator, None):
        os.kill(os.getpid(), signal.SIGHUP)
    assert signal.signal(signal.SIGHUP, before) is signal.SIG_IGN


def test_a_folder_belongs_to_one_training(accelerator, tmp_path):
    with Interruption(tmp_path, accelerator, None):
        (tmp_path / "stopped").write_text("its own")
        with pytest.raises(ValueError, match=rf"{tmp_path} is in use by process {os.getpid()}"):
            Interruption(tmp_path, accelerator, None).__enter__()
        assert (tmp_path / "stopped").exists()


def test_results_of_the_main_process_are_broadcast(accelerator, monkeypatch):
    """The result of other processes is not used; if the main process fails, only its own error is raised."""

    def broadcast(sent):
        monkeypatch.setattr(machine, "broadcast_object_list", lambda found: sent)
        return machine.from_main(accelerator, lambda: 1 / 0)

    monkeypatch.setattr(Accelerator, "is_main_process", False)
    monkeypatch.setattr(Accelerator, "num_processes", 2)

    assert broadcast([False, False]) is False
    with pytest.raises(SystemExit) as ended:
        broadcast([None, True])
    assert ended.value.code == 2
    monkeypatch.setattr(Accelerator, "is_main_process", True)
    told = []
    monkeypatch.setattr(machine, "broadcast_object_list", lambda found: told.extend(found) or found)
    with pytest.raises(ZeroDivisionError):
        machine.from_main(accelerator, lambda: 1 / 0)
    assert told == [None, True]
