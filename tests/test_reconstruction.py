"""Noising and denoising held-out images with a model that is exact for standard normal data."""

import pytest
import torch
from accelerate import Accelerator
from processes import script
from torch import nn

from autoencoders.codec import PixelCodec
from checkpoints.checkpoint import open_checkpoint
from diffusion import GaussianDiffusion
from experiment.build import open_split
from experiment.cli import parse
from experiment.config import SamplingConfig
from sampling.generation import Generator
from sampling.reconstruction import reconstruct, spread_over_classes


class OfWhiteNoise(nn.Module):
    """The exact epsilon for standard normal data: E[noise | x_t] = sigma_t x_t."""

    num_classes = 0

    def __init__(self, diffusion):
        super().__init__()
        self.diffusion, self.times = diffusion, []

    def forward(self, x_t, t, y):
        self.times.append(int(t[0]))
        return self.diffusion.path.transition(t).sigma * x_t


def unguided(num_steps, sampler="ddpm"):
    return SamplingConfig(sampler=sampler, num_steps=num_steps, guidance_scale=1.0)


def generator(sampling, seed=0):
    diffusion = GaussianDiffusion(variance="fixed_small")
    labels, accelerator = torch.zeros(4, dtype=torch.long), Accelerator(cpu=True)
    return Generator(OfWhiteNoise(diffusion), diffusion, PixelCodec(), labels, sampling, (8, 8), seed, accelerator)


IMAGES = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = torch.zeros(4, dtype=torch.long)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp_2m"])
def test_original_noised_one_step_and_chain(sampler):
    drawn = generator(unguided(100, sampler))
    pictures, time = reconstruct(drawn, IMAGES, LABELS, 299)
    pictures = pictures.float() / 127.5 - 1
    assert torch.equal(pictures[:, 0], IMAGES.float() / 127.5 - 1)
    assert time == 293  # of a chain of 100 steps on 1000
    at = drawn.diffusion.path.transition(torch.full((4,), time))
    x_t, one_step = pictures[:, 1], pictures[:, 2]
    inside = x_t.abs() < 0.99  # where 8 bits did not clip it
    assert torch.allclose(one_step[inside], (at.alpha * x_t)[inside], atol=0.01)  # E[x_0 | x_t] of such data
    times = drawn.model.times
    assert len(times) == 30
    assert times == sorted(times, reverse=True)
    assert (times[0], times[-1]) == (293, 0)


def test_deterministic_chain_of_the_exact_model_keeps_the_norm_of_x_t():
    """For standard normal data the probability flow is the identity; 1000 steps of DDIM come close to it."""
    pictures, _ = reconstruct(generator(unguided(1000, "ddim")), IMAGES, LABELS, 200)
    pictures = pictures.float()
    inside = (pictures[:, 1] > 0) & (pictures[:, 1] < 255)
    assert (pictures[:, 3] - pictures[:, 1])[inside].abs().max() <= 2


def test_an_image_depends_on_its_own_stream_and_the_seed():
    drawn = generator(unguided(50))
    together, fewer = (reconstruct(drawn, IMAGES[:n], LABELS[:n], 500)[0] for n in (4, 2))
    assert torch.equal(together[:2], fewer)
    other, _ = reconstruct(generator(unguided(50), seed=1), IMAGES, LABELS, 500)
    assert not torch.equal(together[:, 1], other[:, 1])


def test_reconstruction_from_little_noise_returns_the_image():
    pictures = reconstruct(generator(unguided(50)), IMAGES, LABELS, 0)[0].int()
    assert (pictures[:, 1:] - pictures[:, :1]).abs().max() <= 6  # sigma is 0.01 at t = 0


@pytest.mark.parametrize("t", [-1, 1000])
def test_times_that_do_not_exist_are_told(t):
    with pytest.raises(ValueError, match=rf"--reconstruct {t} must lie in 0..999"):
        reconstruct(generator(unguided(50)), IMAGES, LABELS, t)


def test_images_are_spread_over_the_classes_asked_for():
    labels = torch.tensor([0, 1, 1, 0, 2, 1, 1, 2])
    assert spread_over_classes(labels, [1, 2], 2).tolist() == [1, 5, 4, 7]
    assert spread_over_classes(labels, [2], 5).tolist() == [4, 7]


def test_a_class_without_held_out_images_is_named(folder, tmp_path, monkeypatch):
    program, run = script("sample.py"), folder / "runs" / "tiny"
    images = open_split(open_checkpoint(run).config.data, "test")
    images.labels = torch.zeros_like(images.labels)
    monkeypatch.setattr("experiment.build.open_split", lambda *_: images)
    flags = ["--checkpoint", run, "--reconstruct", 300, "--classes", "[star]", "--output", tmp_path / "x.png"]
    with pytest.raises(ValueError, match="--reconstruct: there are no held-out images of star; give other --classes"):
        program.main(parse(program.SampleConfig, [*map(str, flags)]))
