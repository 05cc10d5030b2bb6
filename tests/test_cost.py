"""The cost of a model against counts made by hand."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from metrics.cost import cost, throughput


class Backbone(nn.Module):
    """A single 3x3 convolution, with time and label added."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, kernel_size=3, padding=1)
        self.label = nn.Embedding(11, 8)

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.conv(x_t) + (self.label(y) * t[:, None])[:, :, None, None]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_cost_is_counted_by_hand(device: str) -> None:
    counted = cost(Backbone().to(device), latent_shape=(4, 16, 24), num_classes=10)
    multiply_adds = (16 * 24) * 8 * (4 * 3 * 3)
    assert counted.parameters == 4 * 8 * 9 + 8 + 11 * 8
    assert counted.gflops / 2 == pytest.approx(multiply_adds / 1e9)
    assert counted.gflops == pytest.approx(2 * multiply_adds / 1e9)


def test_cost_leaves_the_model_alone() -> None:
    model = Backbone().train()
    cost(model, latent_shape=(4, 8, 8), num_classes=10)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_attention_is_counted(device: str) -> None:
    """The DiT paper gives 6.06 "Gflops" (multiply-adds) for DiT-S/2 on 32x32x4 latents."""
    from models import create_model

    with torch.device(device):
        model = create_model("DiT-S/2", input_size=32, in_channels=4, out_channels=8, num_classes=1000)
    assert cost(model, latent_shape=(4, 32, 32), num_classes=1000).gflops / 2 == pytest.approx(6.06, rel=0.01)


def test_throughput_is_the_median(monkeypatch) -> None:
    now, naps = [0.0], iter([9.0, 0.5, 0.25, 0.25, 0.25, 0.5])  # the first warms up
    monkeypatch.setattr("metrics.cost.time", SimpleNamespace(perf_counter=lambda: now[0]))
    assert throughput(lambda: now.append(now.pop() + next(naps)), batch_size=4) == 4 / 0.25
