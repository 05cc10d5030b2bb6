"""Augmentation with labels: its distribution, each transform against another library, backbones with augmentation
labels, and a training."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import test_backbones as promises
import torch
import yaml
from exact import generator
from mean_colour import PROBE, MeanColour
from processes import TINY, log, run, weights
from safetensors import safe_open
from scipy import ndimage
from test_backbones import FAMILIES, inputs, small, wake
from test_batches import batches, cache, joined  # noqa: F401
from torchvision.transforms.v2 import functional as tv

from autoencoders.codec import PixelCodec, create_codec
from data.augmentation import NUM_CHANGES, REACH, SPREAD, apply_augmentation, sample_augmentation
from experiment.build import build_diffusion, model_spec
from experiment.config import AlignmentConfig, DiffusionConfig, ExperimentConfig, TrainConfig
from metrics.programs import save_program

told = pytest.mark.parametrize("name", [name for name in FAMILIES if name != "Cascade"])


def told_as(**numbers):
    """Augmentation labels [1 n] with the named values, all others 0."""
    names = ("mirrored", "flipped", "shift_x", "shift_y", "size", "cos", "sin", "along", "across", "x", "y")
    return torch.tensor([[float(numbers.get(name, 0)) for name in names]])


def smooth(height=32, width=24):
    """A picture of a few slow waves, on which all interpolations agree."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    waves = [torch.sin(0.31 * x + 0.17 * y), torch.cos(0.23 * y - 0.11 * x), torch.sin(0.07 * x * 0.5 + 0.3 * y + 1)]
    return (127.5 + 90 * torch.stack(waves)).round().to(torch.uint8)[None]


def noise(num=64, height=16, width=16):
    return torch.randint(256, (num, 3, height, width), generator=generator(3)).to(torch.uint8)


# What is drawn.


def test_augmentations_have_the_requested_probability_and_standard_deviation():
    drawn = sample_augmentation(0.25, torch.arange(40_000) % 2, (32, 16), generator())
    assert torch.equal(drawn[:, 0], (torch.arange(40_000) % 2).float())
    groups = {"flipped": [1], "shifted": [2, 3], "size": [4], "turned": [5, 6], "stretched": [7, 8], "moved": [9, 10]}
    for name, columns in groups.items():
        share = (drawn[:, columns] != 0).any(dim=1).float().mean().item()
        expected = {"flipped": 0.125, "shifted": 0.25 * (1 - 1 / 4 / 8)}.get(name, 0.25)  # whole steps of 0 and 0
        assert share == pytest.approx(expected, abs=0.01), name
    for column in (4, 9, 10):
        assert drawn[:, column][drawn[:, column] != 0].std().item() == pytest.approx(1, abs=0.03)
    stretched = drawn[:, 7:9][(drawn[:, 7:9] != 0).any(dim=1)]
    assert stretched.square().sum(dim=1).mean().item() == pytest.approx(1, abs=0.05)
    pixels = drawn[:, 2:4] * REACH * torch.tensor([16, 32])  # to the right, of a width of 16, and down
    assert torch.equal(pixels, pixels.round())
    assert pixels.abs().amax(dim=0).tolist() == [2, 4]
    independent = torch.corrcoef((drawn[:, [1, 2, 4, 6, 7, 9]] != 0).float().T)
    assert (independent - torch.eye(6)).abs().max() < 0.03


def test_with_probability_zero_nothing_is_drawn_but_the_mirror():
    drawn = sample_augmentation(0.0, torch.ones(8, dtype=torch.int64), (8, 8), generator())
    assert torch.equal(drawn, torch.eye(NUM_CHANGES)[:1].expand(8, -1))


def test_augmentation_labels_are_zero_exactly_for_unchanged_images():
    images = noise(400)
    changes = sample_augmentation(0.1, torch.zeros(400, dtype=torch.int64), (16, 16), generator())
    is_same = (apply_augmentation(images, changes) == images).flatten(1).all(dim=1)
    assert 100 < is_same.sum() < 300
    assert torch.equal(is_same, (changes == 0).all(dim=1))


# Each change.


def by_scipy(image, forward, shift):
    """Transform an image with scipy's splines, by a matrix of (row, column) around the centre and a shift in pixels."""
    middle = (np.array(image.shape[-2:]) - 1) / 2
    inverse = np.linalg.inv(forward)
    offset = middle - inverse @ (middle + shift)
    drawn = [ndimage.affine_transform(part.double().numpy(), inverse, offset, mode="reflect") for part in image[0]]
    return torch.from_numpy(np.stack(drawn)).clamp(0, 255)[None]


def turning(angle):
    """Rotation matrix for (row, column), from the direction of columns to that of rows."""
    return np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])


def stretching(along, across):
    """Matrix that stretches by 2^(SPREAD w) along an axis and 2^(-SPREAD w) across it, given w times cos and sin of
    twice its angle."""
    angle, factor = math.atan2(across, along) / 2, 2 ** (SPREAD * math.hypot(along, across))
    return turning(angle) @ np.diag([1 / factor, factor]) @ turning(-angle)


ANGLE = 0.7
CHANGES = {
    "nothing": ({}, np.eye(2), [0, 0]),
    "flipped": ({"flipped": 1}, np.diag([-1, 1]), [0, 0]),
    "shifted": ({"shift_x": 2 / 3, "shift_y": -0.5}, np.eye(2), [-2, 2]),
    "larger": ({"size": 1.5}, np.eye(2) * 2**0.3, [0, 0]),
    "smaller": ({"size": -1.5}, np.eye(2) * 2**-0.3, [0, 0]),
    "turned": ({"cos": math.cos(ANGLE) - 1, "sin": math.sin(ANGLE)}, turning(ANGLE), [0, 0]),
    "wider": ({"along": 2}, np.diag([2**-0.4, 2**0.4]), [0, 0]),
    "stretched": ({"along": -0.7, "across": 1.2}, stretching(-0.7, 1.2), [0, 0]),
    "moved": ({"x": 0.45, "y": -0.3}, np.eye(2), [-1.2, 1.35]),
}
ALL = {key: value for _, (told, _, _) in CHANGES.items() for key, value in told.items()} | {"size": 0.5}
FORWARD = stretching(-0.7, 1.2) @ turning(ANGLE) * 2**0.1
CHANGES["all"] = (ALL, FORWARD @ np.diag([-1, 1]), FORWARD @ [-2, 2] + [-1.2, 1.35])


@pytest.mark.parametrize("name", CHANGES)
def test_augmentations_equal_scipys_with_the_same_parameters(name):
    numbers, forward, shift = CHANGES[name]
    image = smooth()
    ours, theirs = apply_augmentation(image, told_as(**numbers)), by_scipy(image, forward, shift)
    gap = (ours - theirs).abs()
    if name != "all":  # whose edge is reflected after it was moved
        assert gap.max() < (0.5 + 1e-3 if name in ("nothing", "flipped", "shifted") else 8)  # edges are folded there
    assert gap[..., 8:-8, 8:-8].max() < 2.5
    assert name == "nothing" or (ours.int() - image.int()).abs().float().mean() > 5


def test_rotation_equals_torchvisions():
    image = smooth(48, 48)
    ours = apply_augmentation(image, told_as(cos=math.cos(ANGLE) - 1, sin=math.sin(ANGLE)))
    theirs = tv.rotate(image, -math.degrees(ANGLE), tv.InterpolationMode.BILINEAR)
    assert (ours.int() - theirs.int()).abs()[..., 14:-14, 14:-14].max() <= 3


def test_flips_and_whole_pixel_shifts_do_not_interpolate():
    images = noise(2, 16, 24)
    assert torch.equal(apply_augmentation(images, told_as(flipped=1).expand(2, -1)), images.flip(-2))
    moved = apply_augmentation(images, told_as(shift_x=1 / 3, shift_y=-1).expand(2, -1))
    assert torch.equal(moved[:, :, :-2, 1:], images[:, :, 2:, :-1])
    assert torch.equal(moved[:, :, -2:], moved[:, :, -4:-2].flip(-2))  # the edge's reflection


def test_augmentation_of_an_image_does_not_depend_on_its_batch():
    images, changes = noise(24), sample_augmentation(0.5, torch.zeros(24, dtype=torch.int64), (16, 16), generator())
    together = apply_augmentation(images, changes)
    assert torch.equal(
        together, torch.cat([apply_augmentation(*pair) for pair in zip(images.split(5), changes.split(5), strict=True)])
    )


def test_downscaling_does_not_alias():
    """Waves of 2.2 pixels, scaled by 0.6, are finer than pixels, so the filter must remove them."""
    wave = (127.5 + 100 * torch.sin(2 * math.pi / 2.2 * torch.arange(64))).to(torch.uint8).expand(1, 3, 64, 64)
    smaller = apply_augmentation(wave, told_as(size=math.log2(0.6) / SPREAD)).float()
    assert smaller[..., 16:-16, 16:-16].std() < 0.35 * wave.float().std()


# Backbones.


@told
def test_augmentation_labels_have_no_effect_at_initialisation(name):
    plain, ours = wake(small(name)).eval(), small(name, augment_dim=NUM_CHANGES).eval()
    lacking = ours.load_state_dict(plain.state_dict(), strict=False)
    assert len(lacking.missing_keys) == 1
    assert not lacking.unexpected_keys
    changes = torch.randn(3, NUM_CHANGES, generator=generator())
    with torch.no_grad():
        assert torch.equal(ours(*inputs(), augment=changes), plain(*inputs()))
        wake(ours)
        assert torch.equal(ours(*inputs(), augment=torch.zeros_like(changes)), ours(*inputs()))
        difference = (ours(*inputs(), augment=changes) - ours(*inputs())).flatten(1).abs().amax(dim=1)
    assert (difference > 1e-6).all()
    with pytest.raises(ValueError, match="augment: this backbone takes no augmentation labels"):
        plain(*inputs(), augment=changes)


@told
def test_backbones_with_augmentation_keep_the_contract_and_the_label_map_does_not_decay(name):
    model = wake(small(name, augment_dim=NUM_CHANGES)).train()
    changes = torch.randn(6, NUM_CHANGES, generator=generator())
    with torch.autocast("cpu", torch.bfloat16):
        model(*inputs(6), augment=changes).square().mean().backward()
    (key,) = [key for key, _ in model.named_parameters() if "augment" in key]
    gradient = model.get_parameter(key).grad
    assert gradient is not None
    assert gradient.isfinite().all()
    assert gradient.any(dim=1).all()
    decayed, rest = (group["params"] for group in model.param_groups())
    assert [any(weight is model.get_parameter(key) for weight in part) for part in (decayed, rest)] == [False, True]
    promises.test_samples_of_a_batch_do_not_mix(name, augment_dim=NUM_CHANGES)


# Batches.


def test_augmentation_leaves_other_random_numbers_alone_and_depends_on_seed_step_and_position(cache):  # noqa: F811
    plain, ours = (joined_extras(batches(cache, augment=share).micro_batches(3)) for share in (0.0, 0.5))
    assert "augment" not in plain
    for name in ("y", "t", "noise"):
        assert torch.equal(plain[name], ours[name])
    is_same = (plain["x_0"] == ours["x_0"]).flatten(1).all(dim=1)
    assert torch.equal(is_same, (ours["augment"][:, 1:] == 0).all(dim=1))
    assert torch.equal(ours["augment"][:, 0], (is_mirrored(cache, 3)).float())
    assert ours["x_0"].abs().max() <= 1
    shares = {"num_ranks": 2, "grad_accumulation": 3, "augment": 0.5}
    ranks = [list(batches(cache, rank=rank, **shares).micro_batches(3)) for rank in (0, 1)]
    shared = joined_extras([part for pair in zip(*ranks, strict=True) for part in pair])
    assert all(torch.equal(shared[name], ours[name]) for name in ours)
    others = [batches(cache, augment=0.5).micro_batches(4), batches(cache, augment=0.5, seed=1).micro_batches(3)]
    assert not any(torch.equal(joined_extras(other)["augment"], ours["augment"]) for other in others)


def joined_extras(parts):
    """Join micro-batches, with the backbone's extras among the values."""
    return joined([replace(part, loss_args=part.loss_args.get("extras", {})) for part in parts])


def is_mirrored(cache, step):  # noqa: F811
    """Which images of a step are mirrored, found by their pixels."""
    stream = batches(cache, augment=1e-12)
    (part,) = stream.micro_batches(step)
    first = PixelCodec().draw(cache.read(stream._order(step), torch.zeros(12, dtype=torch.int64)), part.noise)
    return (part.x_0 != first).flatten(1).any(dim=1)


def test_a_contrasts_other_sample_is_changed_as_the_next_one_is(cache):  # noqa: F811
    (part,) = batches(cache, augment=0.5, negatives=True).micro_batches(0)
    assert torch.equal(part.loss_args["negative"][:, 0], part.x_0.roll(-1, dims=0))


# Settings.


@pytest.mark.parametrize(
    ("change_of", "codec", "words"),
    [
        ({}, "embedded", r"images are changed at every step, and latents .* unchanged; take --autoencoder pixel, or 0"),
        (
            {"diffusion": DiffusionConfig("meanflow")},
            "pixel",
            r"the loss of --diffusion.kind meanflow does not support augmentation",
        ),
        ({"diffusion": DiffusionConfig("cascade"), "model": "Cascade"}, "pixel", r"--diffusion.kind cascade does not"),
        ({"alignment": AlignmentConfig("some.pt2")}, "pixel", r"features of --alignment.extractor .* unchanged images"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(change_of, codec, words):
    config = replace(ExperimentConfig(model="DiT", train=TrainConfig(augment=0.12)), **change_of)
    with pytest.raises(ValueError, match=rf"^--train\.augment 0\.12: .*{words}"):
        model_spec(config, create_codec(codec), build_diffusion(config.diffusion), 5)


def test_augmentation_sets_augment_dim_or_refuses_the_backbone():
    config = ExperimentConfig(model="DiT", train=TrainConfig(augment=0.12))
    spec = model_spec(config, PixelCodec(), build_diffusion(config.diffusion), 5)
    assert spec.args == {"augment_dim": NUM_CHANGES}
    with pytest.raises(ValueError, match=r"--model Cascade: kind gaussian with --train.augment takes --model XSwin"):
        model_spec(replace(config, model="Cascade"), PixelCodec(), build_diffusion(config.diffusion), 5)
    none = replace(config, model="XSwin", model_args={"conditioning": "none"})
    with pytest.raises(ValueError, match=r"conditioning=none leaves changes of images no place: --train.augment 0"):
        model_spec(none, PixelCodec(), build_diffusion(config.diffusion), 0).build_on_meta()


def test_a_training_resumes_bitwise_on_any_processes_and_is_sampled_and_scored(folder, tmp_path):
    settings = {**TINY, "name": "augmented", "autoencoder": "pixel"}
    settings["train"] = {**TINY["train"], "augment": 0.5}
    settings["model_args"] = {**TINY["model_args"], "drop_path": 0.0}  # which each process draws for itself
    settings["data"] = {**TINY["data"], "image_size": 16}
    (folder / "augmented.yaml").write_text(yaml.safe_dump(settings))
    run("train.py", "--config", "augmented.yaml", cwd=folder)
    straight, events = weights(folder, "augmented"), log(folder, "augmented")
    assert straight["cond.augment.weight"].abs().sum() > 0
    with safe_open(folder / "runs" / "augmented" / "checkpoints" / "00000004" / "ema.safetensors", "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["config"])["train"]["augment"] == 0.5
    assert f'"augment_dim": {NUM_CHANGES}' in metadata["spec"]

    last = folder / "runs" / "augmented" / "checkpoints" / "00000004"
    last.rename(tmp_path / "last")
    done = run("train.py", "--resume", "runs/augmented", "--train.augment", 0, cwd=folder, check=False)
    assert done.returncode == 2
    assert "--train.augment 0: " in done.stderr
    assert "was trained with set" in done.stderr
    run("train.py", "--resume", "runs/augmented", cwd=folder)
    resumed = weights(folder, "augmented")
    assert all(torch.equal(straight[key], resumed[key]) for key in straight)
    run("train.py", "--config", "augmented.yaml", "--name", "augmented2", cwd=folder, processes=2)
    for ours, theirs in zip(events, log(folder, "augmented2"), strict=True):
        assert ours.get("loss", 0) == pytest.approx(theirs.get("loss", 0), rel=1e-5)

    run("sample.py", "--checkpoint", "runs/augmented", "--num_per_class", 1, "--output", "augmented.npz", cwd=folder)
    assert np.load(folder / "augmented.npz")["arr_0"].shape == (10, 16, 16, 3)
    save_program(MeanColour(), PROBE, folder / "colour.pt")
    flags = ("--extractor", "colour.pt", "--num_samples", 10, "--output", "augmented.json")
    run("evaluate.py", "--samples", "runs/augmented", *flags, cwd=folder)
    assert json.loads((folder / "augmented.json").read_text())["scores"]["frechet_distance[colour]"]["value"] > 0
