"""Sampling by compiled blocks: the samples are the same, and the last batch is not compiled for anew."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from processes import ROOT, run, script

from autoencoders.codec import PixelCodec
from diffusion import FlowMatching
from experiment.config import SamplingConfig
from models import create_model
from models.compilation import compile_blocks
from sampling.generation import Generator

EQUAL = """
import sys
import warnings
from dataclasses import replace

import torch
from accelerate import Accelerator
from torch._dynamo.utils import counters

from autoencoders.codec import PixelCodec
from diffusion import GaussianDiffusion
from experiment.config import SamplingConfig
from models import create_model
from models.compilation import compile_blocks
from models.layers import kernel_launches
from sampling.checks import Unlabelled
from sampling.generation import Generator, generate

warnings.filterwarnings("error", message="Dynamo detected a call to a `functools.lru_cache`")
name, kernel_launches.FUSED_DEVICES, worse = sys.argv[1], {sys.argv[2]}, sys.argv[3]


class Floats(PixelCodec):
    def decode(self, x_0):
        return x_0


def model(seed):
    torch.manual_seed(seed)
    sizes = {"input_size": 8, "in_channels": 3, "out_channels": 6, "num_classes": 4, "dim": 16}
    swin = {"depths": [1], "num_heads": [2], "num_global_blocks": 1}
    made = create_model(name, **sizes, **(swin if name == "XSwin" else {"depth": 2, "num_heads": 2}))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return made.eval().requires_grad_(False)


guided, guide = model(0), Unlabelled(model(1), 4) if worse == "another model" else None
labels, sampling = torch.arange(6) % 4, SamplingConfig(sampler="ddpm", num_steps=3, guidance_scale=2.0)
parts = GaussianDiffusion(), Floats(), labels, sampling, (8, 8), 0, Accelerator(cpu=True)
generator = Generator(guided, *parts, guide_model=guide)
expected = generate(generator, batch_size=4)
for network in filter(None, (guided, guide)):
    compile_blocks(network, backend="aot_eager")
generator = replace(generator, compiled="blocks")
first = generator.draw(torch.arange(4))
num_graphs = counters["stats"]["unique_graphs"]
images = generate(generator, batch_size=4)
(batch,) = generator.batches(torch.arange(5, 6), 4)
assert counters["stats"]["unique_graphs"] == num_graphs > 0, "the last batch was compiled anew"
for found in (images[:4] - first, images - expected, batch.images - expected[5:]):
    assert found.norm() <= 1e-5 * expected.norm(), found.norm() / expected.norm()
"""


@pytest.mark.parametrize(
    ("name", "fused_on", "worse"),
    [
        ("XSwin", "cuda", "the null label"),
        ("XSwin", "cpu", "another model"),  # with the operations of a GPU
        ("DiT", "cuda", "the null label"),
        ("UViT", "cuda", "another model"),
    ],
)
def test_compiled_samples_are_the_same_also_in_the_last_smaller_batch(name, fused_on, worse, tmp_path):
    (tmp_path / "equal.py").write_text(EQUAL)  # by itself, as types are not checked in what is compiled
    run(tmp_path / "equal.py", name, fused_on, worse, cwd=tmp_path)


SAMPLED = f"""
import runpy
from torch._dynamo.utils import counters
from models import compilation

compilation.compile_blocks.__kwdefaults__["backend"] = "eager"
runpy.run_path({str(ROOT / "sample.py")!r}, run_name="__main__")
print(counters["stats"]["unique_graphs"])
"""


def test_the_flag_compiles_the_model_and_its_guide_and_is_recorded(folder):
    """The picture says how it was drawn; the numbers of the run's own settings stay as they were."""
    (folder / "sampled.py").write_text(SAMPLED)
    flags = ("--checkpoint", "runs/tiny", "--class", "star", "--precision", "fp32", "--num_steps", 2)
    flags += ("--guidance_checkpoint", "runs/tiny/checkpoints/00000002", "--guidance_scale", 2, "--output")
    done = run(folder / "sampled.py", *flags, "compiled.png", "--compile", "blocks", cwd=folder)
    assert int(done.stdout.splitlines()[-1]) > 1
    run("sample.py", *flags, "plain.png", cwd=folder)
    with Image.open(folder / "compiled.png") as ours, Image.open(folder / "plain.png") as theirs:
        assert np.abs(np.asarray(ours).astype(int) - np.asarray(theirs)).max() <= 1
        assert "compiled" in str(ours.info)
        assert "compiled" not in str(theirs.info)


def test_what_cannot_be_compiled_is_refused_in_a_sentence(folder):
    done = run("sample.py", "--checkpoint", "runs/tiny", "--compile", "graphs", cwd=folder, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith(
        "--compile graphs: CUDA graphs need a CUDA device, and this one is cpu; give blocks"
    )
    done = run("sample.py", "--checkpoint", "runs/tiny", "--compile", "model", cwd=folder, check=False)
    assert (done.returncode, "--compile" in done.stderr, "Traceback" in done.stderr) == (2, True, False)
    evaluate = script("evaluate.py")
    with pytest.raises(ValueError, match=r"--compile blocks: images\.npz is a fixed set of images"):
        evaluate.check(evaluate.EvaluateConfig(samples="images.npz", compile="blocks"))
    model = create_model(
        "DiT", input_size=4, in_channels=3, out_channels=3, num_classes=2, dim=16, depth=1, num_heads=2
    )
    no_compiler = torch._inductor.config.patch(
        {"cpp.cxx": (None, "no-such-compiler")}
    )  # monkeypatch would hide it after
    with (
        no_compiler,
        pytest.raises(ValueError, match=r"--train\.compile: torch finds no C\+\+ compiler; install g\+\+"),
    ):
        compile_blocks(model, flag="--train.compile")


def test_each_step_of_a_sampler_begins_cuda_graphs_anew(monkeypatch):
    """Within a step a graph's output stays valid, in the next one it is overwritten."""
    begun = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: begun.append(len(calls)))
    calls = []

    class Model(torch.nn.Module):
        def forward(self, x_t, t, y):
            calls.append(t)
            return x_t

    labels, sampling = torch.zeros(2, dtype=torch.int64), SamplingConfig(sampler="heun", num_steps=3)
    parts = FlowMatching(), PixelCodec(), labels, sampling, (4, 4), 0, Accelerator(cpu=True)
    for compiled in (None, "blocks", "graphs"):
        Generator(Model(), *parts, compiled=compiled).draw(torch.arange(2))
    assert begun == [10, 12, 14, 15], "one more call than steps need, at last"
