"""Muon against torch's, which computes in bf16 whatever the machine."""

import pytest
import torch
from torch import nn

from experiment.muon import Muon, orthogonalise


@pytest.mark.parametrize("shape", [(8, 8), (6, 20), (20, 6)])
def test_directions_are_learned_alike(shape):
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    found = orthogonalise(matrix)
    assert torch.linalg.svdvals(found).sub(1).abs().max() < 0.35
    assert torch.nn.functional.cosine_similarity(found.flatten(), (u @ v).flatten(), dim=0) > 0.97


def test_steps_are_those_of_torch(monkeypatch):
    monkeypatch.setattr("experiment.muon.has_bf16", lambda device: (True, ""))
    draw = torch.Generator().manual_seed(0)
    ours, theirs = (nn.Parameter(torch.ones(4, 6)) for _ in range(2))
    optimizers = (
        Muon([ours], lr=0.1),
        torch.optim.Muon([theirs], lr=0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
    )
    for _ in range(3):
        ours.grad = torch.randn(4, 6, generator=draw)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)


def test_it_computes_in_float32_where_bf16_is_emulated(monkeypatch):
    dtypes = []
    monkeypatch.setattr("experiment.muon.orthogonalise", lambda matrix, dtype: dtypes.append(dtype) or matrix)
    weight = nn.Parameter(torch.ones(2, 2))
    weight.grad = torch.ones(2, 2)
    for native in (True, False):
        monkeypatch.setattr("experiment.muon.has_bf16", lambda device, native=native: (native, ""))
        Muon([weight], lr=0.1).step()
    assert dtypes == [torch.bfloat16, torch.float32]


def test_a_convolution_is_a_matrix_of_a_row_an_output_channel():
    kernel, matrix = nn.Parameter(torch.zeros(4, 3, 3, 3)), nn.Parameter(torch.zeros(4, 27))
    kernel.grad = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    matrix.grad = kernel.grad.flatten(1)
    Muon([kernel, matrix], lr=0.1).step()
    assert torch.equal(kernel.flatten(1), matrix)
    with pytest.raises(ValueError, match="give the rest to AdamW"):
        Muon([nn.Parameter(torch.zeros(4))], lr=0.1)
