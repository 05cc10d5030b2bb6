"""The demo's training steps take the time of their arithmetic on this machine, whatever its instructions."""

import time

import torch
import yaml
from processes import ROOT, log, run

from metrics.cost import cost
from models import create_model

LEAST_SHARE = 1 / 20
"""Of the machine's float32 speed, that a step of the demo must reach. About a fifth is usual, of which other work may
take a part; emulated bf16 reaches a fiftieth or less, which is what this is to catch."""


def flops_per_second(side: int = 512, products: int = 50) -> float:
    """Speed of float32 matrix products on this machine. Each measurement takes as long as a training step, so that both
    are disturbed alike by other processes; the fastest of five counts."""
    a, times = torch.randn(side, side), []
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(products):
            a @ a
        times.append(time.perf_counter() - began)
    return products * 2 * side**3 / min(times)


def test_a_step_of_the_demo_runs_at_a_twentieth_of_a_float32_product_or_faster(tmp_path):
    path = ROOT / "configs" / "quickstart.yaml"
    never = {"validate_every": 0, "sample_every": 0, "checkpoint_every": 0}
    flags = {"data.num_images": 80, "train.num_steps": 4, "optim.warmup_steps": 0, "sampling.num_steps": 1}
    flags |= {"log.every": 1, **{f"log.{name}": value for name, value in never.items()}}
    arguments = [text for name, value in flags.items() for text in (f"--{name}", value)]
    run("train.py", "--config", path, *arguments, cwd=tmp_path)
    model = create_model(
        "XSwin",
        input_size=8,
        in_channels=4,
        out_channels=4,
        num_classes=10,
        **yaml.safe_load(path.read_text())["model_args"],
    )
    of_image = cost(model, latent_shape=(4, 8, 8), num_classes=10)
    fastest = max(line["images_per_second"] for line in log(tmp_path, "quickstart") if "images_per_second" in line)
    reached = 3 * of_image.gflops * 1e9 * fastest  # backward costs twice the forward
    assert reached > LEAST_SHARE * flops_per_second(), f"{reached:.3g} FLOP/s"
