"""Metrics on pixels: PSNR and SSIM of pairs of images, and power spectra."""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor

from machine.precision import to_float64

WINDOW, SIGMA = 11, 1.5  # SSIM's Gaussian window: its side and standard deviation, in pixels
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def psnr(images: UInt8[Tensor, "b 3 h w"], others: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, " b"]:
    """Return the peak signal-to-noise ratio of each pair in dB; it is infinite for equal images."""
    mse = (to_float64(images) - to_float64(others)).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(255**2 / mse)


def ssim(images: UInt8[Tensor, "b 3 h w"], others: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, " b"]:
    """Return the structural similarity of each pair, at most 1 (Wang et al. 2004, eq. 13). It is the mean over channels
    and Gaussian windows. Images smaller than the window raise `ValueError`."""
    if min(images.shape[-2:]) < WINDOW:
        raise ValueError(f"SSIM looks at windows of {WINDOW}x{WINDOW} pixels, and these images are smaller")
    x, y = to_float64(images), to_float64(others)
    mean_x, mean_y = _windowed(x), _windowed(y)
    variance_x, variance_y = _windowed(x * x) - mean_x**2, _windowed(y * y) - mean_y**2
    covariance = _windowed(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1)
    structure = (2 * covariance + C2) / (variance_x + variance_y + C2)
    return (luminance * structure).mean(dim=(1, 2, 3))


def _windowed(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h_out w_out"]:
    offsets = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    weights = torch.softmax(-offsets.square() / (2 * SIGMA**2), dim=0)
    rows = F.conv2d(rearrange(x, "b c h w -> (b c) 1 h w"), weights[None, None, None, :])
    return rearrange(F.conv2d(rows, weights[None, None, :, None]), "(b c) 1 h w -> b c h w", b=len(x))


def spatial_frequencies(height: int, width: int) -> Float[Tensor, " k"]:
    """Return the frequencies of `spectrum` in cycles per pixel, from one cycle per image to the Nyquist frequency."""
    side = min(height, width)
    return torch.arange(1, side // 2 + 1) / side


def spectrum(images: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b k"]:
    """Return the radial power spectrum of each image at its `spatial_frequencies`, averaged over channels.

    It is the periodogram of pixels in [0, 1], without their mean and under a Hann window (Welch 1967), averaged over
    directions. For white noise it equals the variance at all frequencies.
    """
    x = to_float64(images) / 255
    x = x - x.mean(dim=(-2, -1), keepdim=True)
    height, width = x.shape[-2:]
    rows, columns = (torch.hann_window(side, dtype=x.dtype, device=x.device) for side in (height, width))
    window = rows[:, None] * columns
    power = torch.fft.fft2(x * window).abs().square().mean(dim=1) / window.square().sum()  # [b h w]

    vertical, horizontal = (torch.fft.fftfreq(side, dtype=x.dtype, device=x.device) for side in (height, width))
    side = min(height, width)
    ring = (torch.hypot(vertical[:, None], horizontal) * side).round().long().flatten()  # [h w]
    sums = power.new_zeros(len(x), int(ring.max()) + 1).index_add_(1, ring, power.flatten(1))
    return (sums / ring.bincount())[:, 1 : side // 2 + 1]
