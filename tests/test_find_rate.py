"""The learning-rate finder: a short training at rising rates."""

import math
import shlex

import pytest
from processes import script

from experiment.cli import parse

find_rate = script("scripts/find_rate.py")
has_diverged, rising_rates, suggest_rate = find_rate.has_diverged, find_rate.rising_rates, find_rate.suggest_rate
smoothed = find_rate.smoothed
FLAGS = shlex.split(
    "--model DiT --model_args '{dim: 16, depth: 1, num_heads: 2, patch_size: 4}' --autoencoder pixel "
    "--diffusion.kind flow --data.image_size 8 --data.num_images 40 --train.batch_size 8 "
    "--train.precision fp32 --optim.lr 1e-3 --optim.muon_lr=5e-3 "
    "--rates.num_steps 30 --rates.lowest=1e-4 --rates.highest 100"
)


def descent(rates, curvature=4.0):
    """Losses of gradient descent on a parabola with a step at each rate; x stays above 0.1, as noise would keep it."""
    x, losses = 1.0, []
    for rate in rates:
        losses.append(0.5 * curvature * x**2)
        if has_diverged(losses):
            break
        x = max(abs(x * (1 - rate * curvature)), 0.1)
    return losses


def test_the_search_stops_where_a_parabola_diverges_and_suggests_a_lower_rate():
    rates = rising_rates(1e-4, 10.0, 200)
    assert rates[0] == pytest.approx(1e-4)
    assert rates[-1] == pytest.approx(10.0)
    losses = descent(rates)
    assert 2 / 4.0 < rates[len(losses) - 1] < 4 * 2 / 4.0  # descent diverges from 2 / curvature on
    assert 0.01 < suggest_rate(rates, losses) < 2 / 4.0


def test_ranges_of_rates_that_do_not_show_the_divergence_are_refused():
    low, high = rising_rates(1e-6, 1e-3, 50), rising_rates(3.0, 10.0, 50)
    with pytest.raises(ValueError, match=r"--rates.highest 0.001: the loss does not diverge up to there; raise it"):
        suggest_rate(low, descent(low))
    with pytest.raises(ValueError, match=r"--rates.lowest 3: the loss only rises from there; lower it"):
        suggest_rate(high, descent(high))


@pytest.mark.parametrize("last", [math.nan, math.inf, 9.0])
def test_a_loss_beyond_the_first_or_all_numbers_has_diverged(last):
    assert not has_diverged([1.0, 0.5, 0.6, 1.2])
    assert has_diverged([1.0, 0.5, 0.6, *[last] * 3])
    assert smoothed([2.0, 2.0]) == pytest.approx([2.0, 2.0])


def test_the_same_seed_finds_the_same_rate_and_says_how_to_train_with_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        find_rate.main(parse(find_rate.FindRateConfig, FLAGS), FLAGS)
    first, second = [line for line in capsys.readouterr().out.splitlines() if "train.py" in line]
    assert first == second
    found, _, command = first.partition(" (runs/DiT-rates/rates.png): python train.py ")
    *arguments, lr_flag, lr, muon_flag, muon_lr = shlex.split(command)
    assert arguments == FLAGS[: FLAGS.index("--optim.lr")]
    assert (lr_flag, lr, muon_flag) == ("--optim.lr", found, "--optim.muon_lr")
    assert 1e-4 < float(lr) < 10
    assert float(muon_lr) == pytest.approx(5 * float(lr), rel=0.1)  # of two digits
    assert {path.name for path in tmp_path.glob("runs/DiT-rates/*")} == {"rates.png", "training.lock"}


def test_the_picture_of_another_search_is_kept(tmp_path):
    (tmp_path / "rates.png").write_bytes(b"another")
    find_rate.draw_rates(tmp_path / "rates.png", [1e-3, 1e-2, 1e-1], [1.0, 0.5, 3.0])
    (kept,) = tmp_path.glob("rates.png.before-*")
    assert kept.read_bytes() == b"another"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--resume", "runs/x"], "--resume runs/x: rates are found for a training's beginning; use --init_from"),
        (["--rates.highest", "1e-7"], r"--rates.lowest 1e-06 must lie below --rates.highest 1e-07"),
    ],
)
def test_what_does_not_fit_is_told(flags, words):
    with pytest.raises(ValueError, match=words):
        find_rate.main(parse(find_rate.FindRateConfig, flags))
