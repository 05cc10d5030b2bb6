"""The predicted duration of an epoch is printed, and predicting it changes nothing."""

import torch
from accelerate import Accelerator

from diffusion import GaussianDiffusion
from models import ModelSpec
from training.preparation import forecast


def test_forecasting_an_epoch_changes_neither_model_nor_random_state():
    diffusion = GaussianDiffusion()
    spec = ModelSpec(
        "XSwin", {"dim": 16, "depths": [1, 1], "num_heads": [1, 2], "num_global_blocks": 1}, (8, 8), 4, 8, 3
    )
    model = spec.build()
    before, random = {name: each.clone() for name, each in model.state_dict().items()}, torch.get_rng_state()
    few, many = (forecast(model, spec, diffusion, Accelerator(cpu=True), num) for num in (1, 10**9))
    assert few.startswith("an epoch takes about 0 s on this CPU")
    assert many.endswith("hours on this CPU; made for CPUs are --config configs/quickstart.yaml and --model XSwin-S")
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
