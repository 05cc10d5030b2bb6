"""Muon against torch's, which computes in bf16 on any machine."""

import pytest
import torch
from processes import ROOT, run
from test_backbones import FAMILIES, small
from test_outside_backbones import SIZES, Plain
from torch import nn

from checkpoints.training_state import load_optimizer, optimizer_tensors
from experiment.config import OptimConfig
from models.backbone import as_backbone
from training.muon import Muon, orthogonalise, split_for_muon
from training.optimizer import Optimizers, build_optimizer


@pytest.mark.parametrize("shape", [(8, 8), (6, 20), (20, 6)])
def test_orthogonalisation_evens_out_singular_values(shape):
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    found = orthogonalise(matrix)
    assert torch.linalg.svdvals(found).sub(1).abs().max() < 0.35
    assert torch.nn.functional.cosine_similarity(found.flatten(), (u @ v).flatten(), dim=0) > 0.97


@pytest.mark.parametrize("rank", [2, 12])
@pytest.mark.parametrize("shape", [(12, 24), (48, 12)])
def test_a_long_matrix_takes_the_same_steps_by_its_gram_matrix(shape, rank):
    draw = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape[0], rank, generator=draw) @ torch.randn(rank, shape[1], generator=draw)
    matrix = matrix + 1e-3 * torch.randn(shape, generator=draw)
    in_double = orthogonalise(matrix.double(), torch.float64)  # which takes them on the matrix itself
    torch.testing.assert_close(orthogonalise(matrix).double(), in_double, rtol=0, atol=1e-3)


def test_muon_equals_torchs(monkeypatch):
    monkeypatch.setattr("training.muon.has_bf16", lambda device: (True, ""))
    draw = torch.Generator().manual_seed(0)
    ours, theirs = (nn.Parameter(torch.ones(4, 6)) for _ in range(2))
    optimizers = (
        Muon([ours], lr=0.1, weight_decay=0.1),
        torch.optim.Muon([theirs], lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    )
    for _ in range(3):
        ours.grad = torch.randn(4, 6, generator=draw)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)


def test_muon_computes_in_float32_where_bf16_is_emulated(monkeypatch):
    dtypes = []
    monkeypatch.setattr("training.muon.orthogonalise", lambda matrix, dtype: dtypes.append(dtype) or matrix)
    weight = nn.Parameter(torch.ones(2, 2))
    weight.grad = torch.ones(2, 2)
    for native in (True, False):
        monkeypatch.setattr("training.muon.has_bf16", lambda device, native=native: (native, ""))
        Muon([weight], lr=0.1).step()
    assert dtypes == [torch.bfloat16, torch.float32]


def test_muon_treats_a_convolution_as_a_matrix_with_a_row_per_output_channel():
    kernel, matrix = nn.Parameter(torch.zeros(4, 3, 3, 3)), nn.Parameter(torch.zeros(4, 27))
    kernel.grad = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    matrix.grad = kernel.grad.flatten(1)
    Muon([kernel, matrix], lr=0.1).step()
    assert torch.equal(kernel.flatten(1), matrix)


def test_other_parameters_take_adamw_steps_with_their_own_rate():
    draw = torch.Generator().manual_seed(0)
    matrix, ours, theirs = nn.Parameter(torch.ones(4, 6)), *(nn.Parameter(torch.ones(5)) for _ in range(2))
    optimizer = Muon([matrix], [ours], lr=0.1, muon_lr=0.5, weight_decay=0.1)
    adamw = torch.optim.AdamW([theirs], lr=0.02, weight_decay=0.1)
    Optimizers(optimizer=optimizer).scale_learning_rates(0.2)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1, 0.02])
    for _ in range(3):
        matrix.grad, ours.grad = torch.ones(4, 6), torch.randn(5, generator=draw)
        theirs.grad = ours.grad.clone()
        optimizer.step()
        adamw.step()
    torch.testing.assert_close(ours, theirs)
    assert set(optimizer.state[matrix]) == {"momentum_buffer", "step"}


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_matrices_are_muons_and_each_parameter_has_one_optimizer(name):
    model = small(name)
    matrices, rest = split_for_muon(model)
    assert {id(p) for p in (*matrices, *rest)} == {id(p) for p in model.parameters()}
    assert len(matrices) + len(rest) == len(list(model.parameters()))
    assert all(matrix.ndim == 2 for matrix in matrices)
    assert matrices


@pytest.mark.parametrize("muon_lr", [None, 0.01])
def test_only_matrices_decay_and_the_order_of_parameters_does_not_depend_on_decay(muon_lr):
    model = small("UViT-tokens-S/2")
    parameters = list(model.parameters()) if muon_lr is None else [p for part in split_for_muon(model) for p in part]
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer = build_optimizer(model, OptimConfig(muon_lr=muon_lr, lr=1e-9, weight_decay=1e6))
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    moved = {names[id(now)] for now, old in zip(parameters, before, strict=True) if not torch.equal(now, old)}
    assert moved == {name for name in names.values() if name.endswith("weight") and "norm" not in name} - {
        "label.weight"
    }

    tensors = optimizer_tensors(optimizer)
    for number, parameter in enumerate(parameters):
        kept = [tensor for name, tensor in tensors.items() if name.startswith(f"{number}.") and tensor.ndim]
        assert kept
        assert all(tensor.shape == parameter.shape for tensor in kept)
    fresh = build_optimizer(model, OptimConfig(muon_lr=muon_lr, lr=1e-9, weight_decay=1e6))
    load_optimizer(fresh, tensors.items())
    for name, tensor in optimizer_tensors(fresh).items():
        assert torch.equal(tensor, tensors[name])


def test_a_model_without_blocks_is_told():
    with pytest.raises(ValueError, match=r"--optim.muon_lr: Muon takes matrices, and this model has none"):
        build_optimizer(as_backbone(Plain)(**SIZES), OptimConfig(muon_lr=0.01))


SHARDED = """
import sys
sys.path.insert(0, {root!r})
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.device_mesh import init_device_mesh
from training.muon import Muon

torch.manual_seed(0)
layer, draw = nn.Linear(6, 5), torch.Generator().manual_seed(1)
whole = nn.Parameter(layer.weight.detach().clone())
fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
optimizers = Muon([layer.weight], [layer.bias], lr=0.1), Muon([whole], lr=0.1)
for _ in range(3):
    x = torch.randn(4, 6, generator=draw)
    layer(x).square().mean().backward()
    nn.functional.linear(x, whole, layer.bias.full_tensor().detach()).square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
torch.testing.assert_close(layer.weight.full_tensor(), whole)
"""


def test_a_sharded_matrix_moves_as_a_whole_one(tmp_path):
    (tmp_path / "sharded.py").write_text(SHARDED.format(root=str(ROOT)))
    run(tmp_path / "sharded.py", cwd=tmp_path, processes=2)
