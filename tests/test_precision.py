"""Precision follows the machine: bf16 where it has instructions for it, else float32; the first line says which."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, PartialState
from processes import ROOT, script
from torch.utils._python_dispatch import TorchDispatchMode

from machine.accelerator import describe_device, open_accelerator
from machine.precision import choose_precision, has_bf16, inference_autocast, set_float32, slowdown_of_bf16

CPU = torch.device("cpu")
STATES = [PartialState._shared_state, AcceleratorState._shared_state]
SHIPPED = sorted((ROOT / "configs").rglob("*.yaml"))


@pytest.fixture
def x86(monkeypatch):
    """A CPU with AVX-512 bf16 unless a test changes it, and an Accelerate that has not chosen a precision yet."""
    before = [dict(state) for state in STATES]
    for state in STATES:
        state.clear()
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    yield monkeypatch
    for state, values in zip(STATES, before, strict=True):
        state.clear()
        state.update(values)


def test_auto_precision_is_bf16_on_cpus_with_bf16_instructions(x86):
    assert choose_precision("auto", CPU) == "bf16"
    x86.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert choose_precision("auto", CPU) == "fp32"
    assert has_bf16(CPU)[1] == "this CPU has no bf16 instructions"
    x86.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert choose_precision("auto", CPU) == "bf16"


@pytest.mark.parametrize("limit", ["AVX2", "avx512_core", "AVX512_CORE_VNNI"])
def test_bf16_instructions_that_the_environment_switches_off_do_not_count(x86, limit):
    x86.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert choose_precision("auto", CPU) == "fp32"
    assert "switched off" in has_bf16(CPU)[1]
    x86.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
    assert choose_precision("auto", CPU) == "bf16"
    x86.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")  # as ATEN_CPU_CAPABILITY=avx2 has it
    assert choose_precision("auto", CPU) == "fp32"


@pytest.mark.parametrize("native", [True, False])
def test_auto_asks_gpus_and_leaves_others_in_float32(monkeypatch, native):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    assert choose_precision("auto", torch.device("cuda", 0)) == ("bf16" if native else "fp32")
    assert choose_precision("auto", torch.device("mps")) == "fp32"


def test_what_is_asked_for_stands_and_other_names_are_refused(x86):
    assert choose_precision("fp32", CPU) == "fp32"
    assert choose_precision("bf16", torch.device("mps")) == "bf16"
    with pytest.raises(ValueError, match=r"precision fp8: unknown, choose from auto, fp32, bf16"):
        choose_precision("fp8", CPU)


@pytest.mark.parametrize(
    ("native", "asked", "line"),
    [
        (True, "auto", "cpu: bf16 (this CPU has bf16 instructions)"),
        (True, "fp32", "cpu: fp32 (as asked for)"),
        (False, "auto", "cpu: fp32 (this CPU has no bf16 instructions)"),
    ],
)
def test_the_first_line_says_which_and_why(x86, capsys, native, asked, line):
    x86.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    accelerator = open_accelerator(asked)
    assert describe_device(accelerator) == line
    assert re.fullmatch(re.escape(line) + r", \d+ threads?.*\n", capsys.readouterr().out)


def test_bf16_where_it_is_emulated_warns_once_with_the_measured_ratio(x86, capsys):
    x86.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    open_accelerator("bf16", flag="--train.precision")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert re.fullmatch(
        r"warning: --train.precision bf16: it is emulated here, and a matrix product takes [\d.]+ times as long as in "
        r"float32; --train.precision auto takes what this machine has instructions for",
        lines[1],
    )


def test_the_measured_ratio_leaves_the_number_of_threads():
    before = torch.get_num_threads()
    assert slowdown_of_bf16(CPU) > 0
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(("precision", "casts"), [("bf16", 1), ("fp32", 0)])
def test_calls_of_a_frozen_model_share_the_casts_of_its_weights(precision, casts):
    """Afterwards its weights are frozen as before."""

    class Casts(TorchDispatchMode):
        weights = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.weights += func is torch.ops.aten._to_copy.default and args[0].shape == (3, 2)
            return func(*args, **(kwargs or {}))

    model = torch.nn.Linear(2, 3).requires_grad_(False)
    with Casts() as counted, inference_autocast(CPU, precision, model, None):
        outputs = [model(torch.ones(1, 2)) for _ in range(3)]
    assert counted.weights == casts
    assert outputs[0].dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
    assert not any(tensor.requires_grad for tensor in [*outputs, *model.parameters()])


def test_the_benchmark_warns_too(x86, capsys):
    x86.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    benchmark = script("scripts/benchmark.py")
    x86.setattr("training.speed.benchmark_device", lambda: CPU)
    assert [benchmark.resolve_precision(asked) for asked in ("auto", "bf16")] == ["fp32", "bf16"]
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("warning: --precision bf16: it is emulated here")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_no_shipped_configuration_fixes_a_precision(path):
    def settings(node):
        for key, value in node.items() if isinstance(node, dict) else ():
            yield key, value
            yield from settings(value)

    assert "precision" not in dict(settings(yaml.safe_load(path.read_text())))


DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *SHIPPED]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_no_documented_command_asks_for_bf16(path: Path):
    assert not re.search(r"precision[ =]bf16", path.read_text())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_tf32_is_used_only_for_convolutions_with_bf16(precision):
    """Feature distances, Muon and likelihoods need exact products of float32 matrices."""
    cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.benchmark, cudnn.allow_tf32, products.allow_tf32
    cudnn.benchmark, products.allow_tf32 = False, True
    try:
        set_float32(precision)
        assert (cudnn.benchmark, cudnn.allow_tf32, products.allow_tf32) == (True, precision == "bf16", False)
    finally:
        cudnn.benchmark, cudnn.allow_tf32, products.allow_tf32 = before


def test_cuda_is_told_so_where_it_is_opened(x86):
    told = []
    x86.setattr("machine.accelerator.set_float32", told.append)
    open_accelerator("fp32")
    assert told == []  # a CPU has no TF32
    x86.setattr("machine.accelerator.default_device", lambda: torch.device("cuda", 0))
    x86.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    x86.setattr("machine.accelerator.bf16_warning", lambda *asked: None)
    open_accelerator("fp32")
    assert told == ["fp32"]
