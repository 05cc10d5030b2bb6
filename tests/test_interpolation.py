"""Interpolation between classes and seeds: its ends are ordinary samples, and what lies between differs from both."""

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator

from autoencoders.codec import PixelCodec
from diffusion import GaussianDiffusion
from experiment.config import SamplingConfig
from models import create_model
from sampling.generation import Generator
from sampling.interpolation import interpolate, slerp


@pytest.fixture(scope="module")
def generator():
    diffusion = GaussianDiffusion(variance="fixed_small")
    model = create_model(
        "DiT", input_size=8, in_channels=3, out_channels=3, num_classes=4, dim=16, depth=1, num_heads=2
    )
    stream = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=stream)
    sampling = SamplingConfig(sampler="ddpm", num_steps=4, guidance_scale=2.0)
    accelerator, labels = Accelerator(cpu=True), torch.tensor([1])
    return Generator(model.eval(), diffusion, PixelCodec(), labels, sampling, (8, 8), 5, accelerator)


def drawn(generator, **changes):
    return replace(generator, **changes).draw(torch.tensor([0]))[0]


def close(a, b):
    return (a.int() - b.int()).abs().max() <= 1


def test_ends_between_classes_are_their_samples(generator):
    images = interpolate(generator, (1, 3), (5, 5), 4)
    assert images.shape == (4, 3, 8, 8)
    assert close(images[0], drawn(generator))
    assert close(images[3], drawn(generator, labels=torch.tensor([3])))
    assert not close(images[0], images[1])
    assert not close(images[1], images[3])


def test_classes_are_mixed_in_bfloat16_too(generator):
    with torch.autocast("cpu", torch.bfloat16):
        images = interpolate(generator, (1, 3), (5, 5), 4)
    assert not close(images[0], images[3])


@pytest.mark.parametrize(("labels", "seeds"), [((1, 3), (5, 8)), ((1, 1), (5, 8))])
def test_a_single_picture_of_an_interpolation_equals_that_of_the_whole(generator, labels, seeds):
    images = interpolate(generator, labels, seeds, 4)
    for place in (0, 2):
        (alone,) = interpolate(generator, labels, seeds, 4, only=place)
        assert close(alone, images[place])


def test_interpolation_gives_the_guide_the_same_classes(generator):
    torch.manual_seed(1)
    guide = create_model(
        "DiT", input_size=8, in_channels=3, out_channels=3, num_classes=4, dim=16, depth=1, num_heads=2
    )
    for parameter in guide.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    guided = replace(generator, guide_model=guide.eval())
    images = interpolate(guided, (1, 3), (5, 5), 4)
    assert close(images[0], drawn(guided))
    assert close(images[3], drawn(guided, labels=torch.tensor([3])))


def test_ends_between_seeds_start_from_their_noise(generator):
    steady = replace(generator, sampling=replace(generator.sampling, sampler="ddim"))
    images = interpolate(steady, (1, 1), (5, 8), 3)
    assert close(images[0], drawn(steady))
    assert close(images[2], drawn(steady, seed=8))
    assert not close(images[1], images[0])


def test_the_way_between_two_noises_keeps_their_variance():
    first, second = (torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    found = slerp(first, second, torch.linspace(0, 1, 5)[:, None, None, None])
    assert torch.allclose(found.std(dim=(1, 2, 3)), torch.ones(5), atol=0.05)
    assert torch.equal(slerp(first, first, torch.full((1, 1, 1, 1), 0.5)), first)


def test_interpolation_needs_two_pictures(generator):
    with pytest.raises(ValueError, match="--interpolate 1 must be at least 2"):
        interpolate(generator, (0, 1), (0, 0), 1)
