"""Models that learn their guidance, and sample without."""

import pytest
import torch
from exact import generator, randn
from test_backbones import small, wake
from torch import nn

from diffusion import DIFFUSIONS, EDM, FlowMatching, GaussianDiffusion
from diffusion.guidance import drop_labels
from diffusion.paths import GaussianChain
from experiment.config import SamplingConfig
from sampling.checks import resolve_sampling

PREDICTIONS = ["velocity", "x_0", "epsilon", "v"]


class Constant(nn.Module):
    """Predicts the same for each label whatever the image; the last label is the null label."""

    def __init__(self, values):
        super().__init__()
        self.values, self.num_classes, self.num_calls = nn.Parameter(torch.tensor(values)), len(values) - 1, 0

    def forward(self, x_t, t, y):
        self.num_calls += 1
        return torch.zeros_like(x_t) + self.values[y][:, None, None, None]


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("scale", [1.5, 3.0])
def test_a_model_with_the_output_of_classifier_free_guidance_is_its_own_target(prediction, scale):
    labelled, unlabelled = torch.tensor([0.5, -2.0]), 0.25
    guided = unlabelled + scale * (labelled - unlabelled)
    diffusion, model = FlowMatching(prediction=prediction, guidance_scale=scale), Constant([*guided, unlabelled])
    x_t, t, y = randn(3, 2, 4, 4), torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0, 1, 2])
    target = torch.tensor([*labelled, unlabelled])[y][:, None, None, None].expand_as(x_t)
    learned = diffusion.guided_target(model, x_t, t, y, target)
    torch.testing.assert_close(learned, model(x_t, t, y).detach())


@pytest.mark.parametrize(
    "diffusion",
    [GaussianDiffusion(guidance_scale=2.0), EDM(guidance_scale=2.0, uncertainty=True)],
    ids=["learned variance", "uncertainty"],
)
def test_channels_beside_the_prediction_learn_no_guidance(diffusion):
    model, x_t, t, y = Constant([1.0, 3.0, 0.0]), randn(2, 2, 4, 4), torch.tensor([3, 5]), torch.tensor([0, 2])
    widened = lambda x, *inputs: torch.cat([model(x, *inputs)] * 2, dim=1)  # noqa: E731
    widened.modules = model.modules
    times = t if isinstance(diffusion.path, GaussianChain) else t / 10
    learned = diffusion.guided_target(widened, x_t, times, y, torch.zeros_like(x_t))
    torch.testing.assert_close(learned, torch.tensor([0.5, 0.0])[:, None, None, None].expand_as(x_t))


def test_training_ends_at_the_guided_prediction():
    """Labels 0 and 1 stand for images of -1 and 1, so that without a label the mean is 0."""
    scale, model = 3.0, Constant([0.1, 0.2, 0.3])
    diffusion, stream = FlowMatching(prediction="x_0", guidance_scale=scale), generator()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    labels = torch.arange(64) % 2
    for _ in range(150):
        x_0 = (2.0 * labels - 1)[:, None, None, None].expand(-1, 1, 2, 2)
        y = drop_labels(labels, 0.5, 2, generator=stream)
        loss = diffusion.training_loss(model, x_0, y, generator=stream)["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(model.values.detach(), torch.tensor([-scale, scale, 0.0]), rtol=0, atol=0.5)


def test_without_a_scale_the_model_is_called_once():
    for scale, calls in ((1.0, 1), (2.0, 2)):
        model = Constant([1.0, 2.0])
        diffusion = FlowMatching(guidance_scale=scale)
        loss = diffusion.training_loss(model, randn(2, 1, 2, 2), torch.tensor([0, 1]), generator=generator())
        assert model.num_calls == calls
        assert model.training
        loss["loss"].sum().backward()


def test_learned_guidance_is_not_applied_again_by_default():
    config = SamplingConfig(guidance_scale=1.5)
    for sampler in ("euler", "dpmpp_2m"):
        assert resolve_sampling(config, FlowMatching(guidance_scale=3.0), 10, sampler=sampler).guidance_scale == 1
        assert resolve_sampling(config, FlowMatching(), 10, sampler=sampler).guidance_scale == 1.5


@pytest.mark.parametrize(
    ("kind", "settings", "num_passes"),
    [
        ("flow", {}, 3),
        ("flow", {"guidance_scale": 2.0}, 5),
        ("gaussian", {"guidance_scale": 2.0, "variance": "fixed_small"}, 5),
        ("edm", {"guidance_scale": 2.0}, 5),
        ("meanflow", {"interval_share": 0.5}, 4),
        ("meanflow", {"interval_share": 0.5, "tangent": "model", "omega": 2.0}, 6.5),
        ("shortcut", {"interval_share": 0.5, "guidance_scale": 2.0}, 5),
    ],
)
def test_the_calls_that_a_target_takes_count_as_training(kind, settings, num_passes):
    """Counted as rows that pass through the model: forward only, and those with a gradient thrice."""
    model, rows = wake(small("DiT-S/2", second_time=kind in ("meanflow", "shortcut"), out_channels=4)), []
    model.register_forward_pre_hook(
        lambda model, inputs: rows.append(len(inputs[0]) * (3 if torch.is_grad_enabled() else 1))
    )
    diffusion = DIFFUSIONS[kind](**settings)
    diffusion.training_loss(model, randn(8, 4, 8, 8), torch.arange(8) % 3, generator=generator())
    jacobian_product = 0.5 if kind == "meanflow" else 0  # a forward pass and as much again for the derivative
    assert sum(rows) / 8 + jacobian_product == diffusion.num_forward_passes == num_passes
