"""PSNR, SSIM and spectra against closed forms and against direct computations."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from metrics.pixelwise import C1, C2, psnr, spatial_frequencies, spectrum, ssim


def noise(num=2, height=24, width=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num, 3, height, width), dtype=torch.uint8, generator=generator)


def plain(value, size=24):
    return torch.full((1, 3, size, size), value, dtype=torch.uint8)


@given(st.integers(0, 255), st.integers(0, 255))
@settings(max_examples=30)
def test_plain_images_have_a_closed_form(a, b):
    x, y = plain(a), plain(b)
    luminance = (2 * a * b + C1) / (a * a + b * b + C1)  # contrasts are equal: both zero
    assert ssim(x, y).item() == pytest.approx(luminance, abs=1e-9)
    expected = math.inf if a == b else 20 * math.log10(255 / abs(a - b))
    assert psnr(x, y).item() == pytest.approx(expected)


def test_equal_images_score_highest_and_pairs_are_independent():
    x, y = noise(), noise(seed=1)
    assert ssim(x, x).tolist() == pytest.approx([1, 1])
    assert psnr(x, x).tolist() == [math.inf, math.inf]
    torch.testing.assert_close(ssim(x, y)[1:], ssim(x[1:], y[1:]))
    torch.testing.assert_close(psnr(x, y)[1:], psnr(x[1:], y[1:]))
    assert (ssim(x, y).abs() < 0.2).all()


def test_ssim_is_that_of_scipys_gaussian():
    """At positions whose window lies inside the image; scipy's filter is truncated to the same 11 pixels."""
    x = noise(1)
    y = (0.7 * x.float() + 0.3 * noise(1, seed=1).float()).to(torch.uint8)

    def blurred(image):
        return gaussian_filter(image, (0, 1.5, 1.5), radius=(0, 5, 5))[:, 5:-5, 5:-5]

    a, b = (each[0].double().numpy() for each in (x, y))
    mean_a, mean_b = blurred(a), blurred(b)
    var_a, var_b, cov = blurred(a * a) - mean_a**2, blurred(b * b) - mean_b**2, blurred(a * b) - mean_a * mean_b
    expected = (2 * mean_a * mean_b + C1) * (2 * cov + C2) / ((mean_a**2 + mean_b**2 + C1) * (var_a + var_b + C2))
    constants = [C1, C2]
    assert constants == pytest.approx([6.5025, 58.5225])
    assert ssim(x, y).item() == pytest.approx(expected.mean(), abs=1e-9)


def test_ssim_says_what_is_too_small():
    with pytest.raises(ValueError, match="windows of 11x11 pixels"):
        ssim(plain(3, size=8), plain(4, size=8))


@pytest.mark.parametrize("cycles", [4, 9, 14])
def test_a_wave_has_its_power_at_its_frequency(cycles):
    size = 32
    wave = 127.5 + 100 * np.cos(2 * np.pi * cycles * (np.arange(size) + 0.3) / size)
    image = torch.from_numpy(wave.round().astype(np.uint8)).expand(1, 3, size, size)
    for turned in (image, image.mT):
        power = spectrum(turned.contiguous())[0]
        assert spatial_frequencies(size, size)[power.argmax()].item() == pytest.approx(cycles / size)
        around = power[cycles - 2 : cycles + 1].sum()  # a Hann window spreads a wave over its neighbours
        assert around / power.sum() > 0.99


def test_white_noise_has_its_variance_at_all_frequencies():
    images = noise(400, 32, 32)
    power = spectrum(images).mean(dim=0)
    assert len(power) == len(spatial_frequencies(32, 32)) == 16
    assert (power / (images.double() / 255).var() - 1).abs().max() < 0.1


def test_the_spectrum_of_a_ramp_has_no_power_from_the_jump_at_the_border():
    """Without a window, power would fall only by 1 / f^2, because of the jump between the last column and the first."""
    ramp = torch.linspace(0, 255, 64).to(torch.uint8).expand(1, 3, 64, 64).contiguous()
    power = spectrum(ramp)[0]
    assert (power[8:] / power[0]).max() < 1e-4


def test_plain_and_oblong_images_have_spectra():
    assert spectrum(plain(7)).max() < 1e-20
    found = spectrum(noise(2, 20, 33))
    assert found.shape == (2, len(spatial_frequencies(20, 33)))
    assert found.isfinite().all()
    assert spatial_frequencies(20, 33)[-1] == 0.5
