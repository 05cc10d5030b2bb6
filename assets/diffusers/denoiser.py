"""Backbone of an exported pipeline: a program written by torch.export, which runs without the model's code."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch.export.passes import move_to_device_pass


class ExportedDenoiser(ModelMixin, ConfigMixin):
    """Denoiser `denoiser(x_t, t, y)` in float32, for any batch size; `y` may be `num_classes`, the null label.

    A scheduler's timestep is converted to the model's time by `time_offset + time_rate * timestep`.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(
        self,
        num_classes: int,
        channels: int,
        out_channels: int,
        height: int,
        width: int,
        time_offset: float = 0.0,
        time_rate: float = 1.0,
    ) -> None:
        super().__init__()
        self.register_buffer("place", torch.empty(0), persistent=False)  # its device is the one that `.to` chose
        self._program: Any = None
        self._run: Any = None  # (device, the program moved to it)

    @classmethod
    def from_pretrained(cls, folder: str | Path, torch_dtype: torch.dtype | None = None, **options: Any):
        """Load the denoiser from a folder with `config.json` and `denoiser.pt2`.

        Raises:
            ValueError: for a precision other than float32, in which the program was exported.
        """
        if torch_dtype not in (None, torch.float32):
            raise ValueError(f"torch_dtype={torch_dtype}: the exported backbone is in float32; leave it out")
        denoiser = cls.from_config(cls.load_config(folder))
        with warnings.catch_warnings():  # torch 2.9 warns of its own reader
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            denoiser._program = torch.export.load(Path(folder) / "denoiser.pt2")
        return denoiser.eval()

    @torch.no_grad()
    def forward(self, x_t: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        device = self.place.device
        if self._run is None or self._run[0] != device:
            self._run = device, move_to_device_pass(self._program, device).module()
        time = self.config.time_offset + self.config.time_rate * t.float()
        return self._run[1](x_t.float(), time, y)
