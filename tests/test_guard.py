"""What watches a training: skipped steps, rollbacks, means between log lines, signals."""

import os
import signal

import pytest
import torch
from accelerate import Accelerator

from experiment.guard import Guard, TrainingDivergedError, gradient_norm
from experiment.interruption import SIGNALS, Interruption
from experiment.meter import Meter


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture
def own_signals():
    """Puts back what handled the signals before."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_steps_that_are_not_finite_are_counted_and_then_rolled_back():
    guard = Guard(patience=3, max_rollbacks=1)
    assert guard.passes(1.0)
    assert [guard.passes(float("nan")), guard.passes(float("inf"))] == [False, False]
    assert not guard.must_roll_back(can=True)
    assert guard.passes(2.0)  # one good step: the count of those in a row begins anew
    assert guard.in_a_row == 0
    for _ in range(3):
        guard.passes(float("nan"))
    assert guard.must_roll_back(can=True)
    assert (guard.skipped, guard.rollbacks) == (5, 1)
    for _ in range(3):
        guard.passes(float("nan"))
    with pytest.raises(TrainingDivergedError, match="after 1 returns to the last checkpoint"):
        guard.must_roll_back(can=True)


def test_without_a_checkpoint_there_is_nothing_to_go_back_to():
    guard = Guard(patience=1)
    guard.passes(float("nan"))
    with pytest.raises(TrainingDivergedError, match=r"lower --optim.lr"):
        guard.must_roll_back(can=False)


def test_rollbacks_outlive_the_checkpoint_they_return_to():
    guard = Guard(rollbacks=2)
    guard.restore({"skipped": 1, "in_a_row": 0, "rollbacks": 0})
    assert guard.state() == {"skipped": 1, "in_a_row": 0, "rollbacks": 2}


@pytest.mark.parametrize("max_norm", [0.0, 1.0])
def test_gradient_norm_and_its_clip(accelerator, max_norm):
    layer = torch.nn.Linear(2, 1, bias=False)
    layer.weight.grad = torch.tensor([[3.0, 4.0]])
    assert gradient_norm(accelerator, layer, max_norm) == pytest.approx(5)
    assert layer.weight.grad.norm() == pytest.approx(max_norm or 5)


def test_meter_means_by_term_and_quarter_without_skipped_steps(accelerator):
    meter = Meter()
    meter.add({"loss": torch.tensor([1.0, 3.0]), "mse": torch.tensor([0.5, 0.5])}, torch.tensor([0, 0.999]))
    meter.step(2.0, 1.0, 2)
    meter.add({"loss": torch.tensor([float("nan")] * 2), "mse": torch.zeros(2)}, torch.tensor([0, 0]))
    meter.skip()
    meter.add({"loss": torch.tensor([5.0, 7.0]), "mse": torch.tensor([0.5, 1.5])}, torch.tensor([0.01, 0.6]))
    meter.step(0.5, 1.0, 2)
    means = meter.summary(accelerator)
    assert means["loss"] == pytest.approx(4)
    assert means["mse"] == pytest.approx(0.75)
    assert [means.get(f"loss_quarter_{n}") for n in (1, 2, 3, 4)] == [3, None, 7, 3]
    assert (means["gradient_norm"], means["clipped"]) == (1.25, 0.5)
    assert means["memory_gb"] > 0.01


def test_meter_goes_on_where_a_checkpoint_left_it(accelerator):
    straight, cut = Meter(), Meter()
    for number in range(4):
        for meter in (straight, cut):
            meter.add({"loss": torch.tensor([0.1 * number, 1 / 3])}, torch.tensor([0, 0.5]))
            meter.step(number / 3, 0.0, 2)
        if number == 1:
            state = cut.state(accelerator)
            cut = Meter()
            cut.restore(state, accelerator)
    measured = {"images_per_second", "waiting_for_data", "memory_gb"}
    one, other = (meter.summary(accelerator) for meter in (straight, cut))
    assert {name: one[name] for name in one if name not in measured} == {
        name: other[name] for name in other if name not in measured
    }


@pytest.mark.parametrize("number", SIGNALS)
def test_signals_become_a_reason(accelerator, own_signals, number):
    interruption = Interruption(accelerator, None)
    assert interruption.reason() is None
    os.kill(os.getpid(), number)
    assert interruption.reason() == signal.Signals(number).name


def test_time_that_is_over_is_a_reason(accelerator, own_signals):
    assert Interruption(accelerator, 10.0).reason() is None
    assert Interruption(accelerator, 1e-12).reason() == "--train.max_hours 1e-12 are over"


def test_nothing_is_saved_while_steps_are_skipped_nor_with_ruined_weights(accelerator):
    guard, model = Guard(patience=3), torch.nn.BatchNorm1d(2)
    assert guard.may_save(accelerator, model)
    guard.passes(float("nan"))
    assert not guard.may_save(accelerator, model)
    assert guard.may_save(accelerator, model, last=True)
    guard.passes(1.0)
    model.running_mean[0] = float("nan")
    assert not guard.may_save(accelerator, model)
    assert guard.must_roll_back(can=True)
    with pytest.raises(TrainingDivergedError, match="after the last step weights are not finite"):
        guard.may_save(accelerator, model, last=True)
