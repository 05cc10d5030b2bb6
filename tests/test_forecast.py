"""The predicted duration of a training is printed, and predicting it changes nothing."""

import re

import torch
from accelerate import Accelerator

from diffusion import GaussianDiffusion
from models import ModelSpec
from training.preparation import forecast


def test_forecasting_a_training_changes_neither_model_nor_random_state(monkeypatch):
    diffusion = GaussianDiffusion()
    spec = ModelSpec(
        "XSwin", {"dim": 16, "depths": [1, 1], "num_heads": [1, 2], "num_global_blocks": 1}, (8, 8), 4, 8, 3
    )
    model = spec.build()
    before, random = {name: each.clone() for name, each in model.state_dict().items()}, torch.get_rng_state()

    def predict(num_steps):
        lengths = {"num_images": 1, "num_steps": num_steps, "images_per_step": 10**4}
        return forecast(model, spec, diffusion, Accelerator(cpu=True), **lengths)

    assert re.fullmatch(r"1000000 steps take about [0-9.]+ hours on this CPU, an epoch 0 s", predict(10**6))
    monkeypatch.setattr("training.preparation.LARGE", 0)
    assert "configs/own_images.yaml" not in predict(1)
    assert "configs/own_images.yaml" in predict(10**6)
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
