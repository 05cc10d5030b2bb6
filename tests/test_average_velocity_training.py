"""Training of MeanFlow and shortcuts: targets, gradients and guidance of every backbone."""

import pytest
import torch
from exact import generator, randn
from test_backbones import FAMILIES, RANDOM, inputs, small, wake
from torch import nn

from checkpoints.checkpoint import WEIGHTS, save_tensors
from checkpoints.warm_start import warm_start
from diffusion import DIFFUSIONS, FlowMatching
from diffusion.diffusion import Auxiliary
from diffusion.forward_mode import differentiable_forward
from models import class_of
from models.layers.attention import attend
from training.batches import Batch
from training.objective import Objective
from training.preparation import recompute_blocks

meanflow, shortcut = DIFFUSIONS["meanflow"], DIFFUSIONS["shortcut"]
KINDS = {"meanflow": meanflow, "shortcut": shortcut}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
families = pytest.mark.parametrize("name", [*(name for name in FAMILIES if name != "Cascade"), "LightningDiT-S/2"])


def prepared(name, **overrides):
    """A backbone with a second time, all of whose weights are nonzero."""
    return wake(small(name, second_time=True, out_channels=4, **overrides))


def losses(model, diffusion=None, batch=8, **drawn):
    """Losses of a batch whose second half has two different times."""
    diffusion, (x_0, _, y) = diffusion or meanflow(), inputs(batch)
    drawn = {"is_interval": torch.arange(batch) >= batch // 2} | drawn
    drawn = {"second": torch.full((batch,), 0.1)} | drawn
    t, noise = torch.linspace(0.2, 0.9, batch), randn(*x_0.shape, seed=5)
    return diffusion.training_loss(model, x_0, y, t=t, noise=noise, **drawn)


@kinds
def test_equal_times_give_the_flow_matching_loss(kind):
    model = prepared("DiT-S/2").eval()
    x_0, _, y = inputs(8)
    t, noise = torch.linspace(0.2, 0.9, 8), randn(*x_0.shape, seed=5)
    flow = FlowMatching().training_loss(model, x_0, y, t=t, noise=noise)["mse"]
    alike = losses(model, kind(adaptive_power=0.0), is_interval=torch.zeros(8, dtype=torch.bool))
    torch.testing.assert_close(alike["loss"], flow, rtol=1e-6, atol=0)
    some = losses(model, kind(adaptive_power=1.0))
    torch.testing.assert_close(some["mse"][:4], flow[:4], rtol=1e-6, atol=0)
    assert ((some["mse"] - flow)[4:].abs() > 1e-4).all()
    torch.testing.assert_close(some["loss"], some["mse"] / (some["mse"] + 1e-3))


class DataOf(nn.Module):
    """A model of the data that the velocity of another model leads to."""

    def __init__(self, velocity):
        super().__init__()
        self.velocity = velocity

    def forward(self, x_t, t, y, *, r):
        return x_t - t[:, None, None, None] / 999 * self.velocity(x_t, t, y, r=r)


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize(
    ("kind", "guidance"), [(meanflow, {"omega": 0.5, "kappa": 0.75}), (shortcut, {"guidance_scale": 2.0})], ids=KINDS
)
def test_predicting_the_data_learns_the_same_velocity(kind, guidance, guided):
    """The error, and its gradient, is only scaled: from a velocity at t to the data at 0 it grows by the factor t."""
    model, errors = prepared("DiT-S/2").eval(), []
    for prediction, network in (("velocity", model), ("x_0", DataOf(model))):
        diffusion = kind(prediction=prediction, adaptive_power=0.0, **(guidance if guided else {}))
        mse = losses(network, diffusion)["mse"]
        errors.append((mse, torch.autograd.grad(mse[6], model.patch.weight)[0]))
    t = torch.linspace(0.2, 0.9, 8)
    t[4:] = diffusion.interval_of(t, torch.full((8,), 0.1))[1][4:]
    torch.testing.assert_close(errors[1][0], t**2 * errors[0][0], rtol=1e-4, atol=0)
    torch.testing.assert_close(errors[1][1], t[6] ** 2 * errors[0][1], rtol=1e-3, atol=1e-6)


@kinds
def test_equal_times_give_the_loss_of_a_flow_that_predicts_the_data(kind):
    model, (x_0, _, y) = prepared("DiT-S/2").eval(), inputs(8)
    t, noise = torch.linspace(0.2, 0.9, 8), randn(*x_0.shape, seed=5)
    flow = FlowMatching(prediction="x_0").training_loss(model, x_0, y, t=t, noise=noise)["mse"]
    torch.testing.assert_close(losses(model, kind(prediction="x_0"))["mse"][:4], flow[:4], rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match=r"--diffusion\.prediction epsilon: unknown, choose from velocity, x_0"):
        kind(prediction="epsilon")


@families
def test_the_derivative_along_the_path_is_that_of_finite_differences(name):
    model = prepared(name).eval().double()
    x_t, v, y = randn(2, 4, 8, 8).double(), randn(2, 4, 8, 8, seed=1).double(), torch.tensor([1, 5])
    r, t, step = torch.tensor([0.1, 0.4]).double(), torch.tensor([0.5, 0.8]).double(), 1e-6
    target = meanflow().average_velocity(model, x_t, t, v, torch.arange(2), y=y, r=r)
    u = meanflow().precondition(model)
    with torch.no_grad():
        ends = [u(x_t + sign * step * v, t + sign * step, y, r=r) for sign in (1, -1)]
    derivative = (ends[0] - ends[1]) / (2 * step)
    torch.testing.assert_close((v - target) / 0.4, derivative, rtol=1e-4, atol=1e-4 * derivative.abs().max().item())


@pytest.mark.parametrize("settings", [{}, {"tangent": "model"}, {"omega": 0.5, "kappa": 0.75}], ids=str)
def test_a_small_difference_quotient_gives_the_target_of_the_exact_derivative(settings):
    model = prepared("DiT-S/2").double()
    x_t, v, y = randn(3, 4, 8, 8).double(), randn(3, 4, 8, 8, seed=1).double(), torch.tensor([1, 5, model.num_classes])
    r, t, index = torch.tensor([0.1, 0.4, 0.0]).double(), torch.tensor([0.5, 0.8, 1.0]).double(), torch.arange(3)
    exact, quotient = (
        meanflow(difference=difference, **settings).average_velocity(model, x_t, t, v, index, y=y, r=r)
        for difference in (None, 1e-9)
    )
    assert (exact - v).abs().max() > 0.01
    torch.testing.assert_close(quotient, exact, rtol=1e-4, atol=1e-4 * (exact - v).abs().max().item())


class WithoutForwardDerivative(torch.autograd.Function):
    """The identity, differentiable in reverse mode alone, as fused attention kernels are."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad


def test_a_difference_quotient_needs_no_forward_derivative():
    model = prepared("DiT-S/2")
    model.register_forward_pre_hook(lambda _, args: (WithoutForwardDerivative.apply(args[0]), *args[1:]))
    with pytest.raises((RuntimeError, NotImplementedError), match="forward"):
        losses(model, meanflow())
    losses(model, meanflow(difference=0.02))["loss"].sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("guidance", [{}, {"omega": 0.5, "kappa": 0.75}], ids=["plain", "guided"])
def test_improved_meanflow_differentiates_along_the_velocity_of_the_model(guidance):
    """The sample's own velocity plays no part. The model's velocity under a label already includes guidance, and is not
    guided again."""
    model, diffusion = prepared("DiT-S/2").eval().double(), meanflow(tangent="model", **guidance)
    x_t, y = randn(3, 4, 8, 8).double(), torch.tensor([1, 5, model.num_classes])
    r, t, step = torch.tensor([0.1, 0.4, 0.0]).double(), torch.tensor([0.5, 0.8, 0.4]).double(), 1e-6
    u, zeros = diffusion.precondition(model), torch.zeros_like(x_t)
    with torch.no_grad():
        along = u(x_t, t, y)
        ends = [u(x_t + sign * step * along, t + sign * step, y, r=r) for sign in (1, -1)]
    derivative = (ends[0] - ends[1]) / (2 * step)
    for v in (zeros, randn(*x_t.shape, seed=1).double()):
        target = diffusion.average_velocity(model, x_t, t, v, torch.arange(3), y=y, r=r)
        away = diffusion.guided(model, x_t, t, v, y=y) - target
        torch.testing.assert_close(away / 0.4, derivative, rtol=1e-4, atol=1e-4 * derivative.abs().max().item())
    with pytest.raises(ValueError, match=r"--diffusion\.tangent up: unknown, choose from sample, model"):
        meanflow(tangent="up")


@pytest.mark.parametrize("num_tokens", [16, 80])
def test_attention_among_any_number_of_tokens_has_a_forward_derivative(num_tokens):
    q, k, v, along = (randn(2, num_tokens, 4, seed=seed).double() for seed in range(4))
    bias = randn(num_tokens, num_tokens, seed=5).double()
    with differentiable_forward(None):
        dual = torch.autograd.forward_ad.make_dual(k, along)
        derivative = torch.autograd.forward_ad.unpack_dual(attend(q, dual, v, bias=bias)).tangent
    ends = [attend(q, k + sign * 1e-6 * along, v, bias=bias) for sign in (1, -1)]
    torch.testing.assert_close(derivative, (ends[0] - ends[1]) / 2e-6, rtol=1e-5, atol=1e-6)


@families
def test_a_flows_weights_begin_as_that_flow_whatever_the_second_time(name, tmp_path):
    flow, ours = wake(small(name, out_channels=4)).eval(), small(name, out_channels=4, second_time=True).eval()
    save_tensors(flow.state_dict(), tmp_path / WEIGHTS, {})
    words = warm_start(ours, str(tmp_path))
    assert "not in the checkpoint: " in words
    assert words.count("interval") == 4
    x_t, t, y = inputs()
    with torch.no_grad():
        assert torch.equal(ours(x_t, t, y, r=t / 3), flow(x_t, t, y))
        assert torch.equal(ours(x_t, t, y), ours(x_t, t, y, r=t))
        assert not torch.equal(wake(ours)(x_t, t, y, r=t / 3), ours(x_t, t, y))


def test_a_backbone_without_a_second_time_refuses_one():
    x_t, t, y = inputs()
    for name in ("DiT-S/2", "UViT-tokens-S/2"):
        with pytest.raises(ValueError, match="r: this backbone takes no second time"):
            small(name)(x_t, t, y, r=t)


@families
@kinds
def test_all_gradients_are_finite_in_bfloat16_and_reach_every_weight(kind, name):
    check_gradients_in_bfloat16(kind(), prepared(name).train())


@kinds
def test_all_gradients_are_finite_in_bfloat16_with_group_norms(kind):
    check_gradients_in_bfloat16(kind(), prepared("XSwin", conv_norm="group").train())


def check_gradients_in_bfloat16(diffusion, model):
    with torch.autocast("cpu", torch.bfloat16):
        loss = losses(model, diffusion)["loss"].mean()
    loss.backward()
    for key, weight in model.named_parameters():
        assert weight.grad is not None, key
        assert weight.grad.isfinite().all(), key
        assert weight.grad.any() or key.endswith(("convs.0.bias", "convs.1.bias", "convs.2.bias", "unpatch.bias")), key


@kinds
def test_the_target_is_of_the_model_that_is_sampled(kind):
    """Stochastic depth and batch statistics are off for the target; the loss's own call uses both, once."""
    model, seen = prepared("XSwin", **RANDOM["XSwin"]).train(), []
    diffusion = kind()
    whole = diffusion.average_velocity

    def spy(*arguments, **told):
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        seen.append(whole(*arguments, **told))
        assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
        return seen[-1]

    diffusion.average_velocity = spy
    for seed in range(2):
        torch.manual_seed(seed)
        losses(model, diffusion, batch=2)
        assert all(part.training for part in model.modules())
        state = model.state_dict()
        assert {state[name].item() for name in state if "num_batches" in name} == {seed + 1}
        for norm in (part for part in model.modules() if isinstance(part, nn.BatchNorm2d)):
            norm.reset_running_stats()
            norm.num_batches_tracked += seed + 1
    assert torch.equal(*seen)


@kinds
@pytest.mark.parametrize("name", ["DiT-S/2", "UNet-CIFAR10"])
def test_recomputed_blocks_have_the_same_gradients(kind, name):
    found = []
    for change in (lambda model: None, lambda model: recompute_blocks(model, torch.device("cpu"))):
        model = prepared(name, **RANDOM.get(class_of(name).__name__, {})).train()
        change(model)
        torch.manual_seed(3)
        losses(model, kind(), batch=4)["loss"].sum().backward()
        found.append([weight.grad for weight in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@kinds
def test_parts_of_a_batch_keep_the_times_of_the_whole_batch(kind):
    diffusion = kind()
    whole = diffusion.draw_loss_args((12, 1, 2, 2), generator())["is_interval"]
    assert whole.nonzero().flatten().tolist() == [3, 7, 11]
    assert kind(interval_share=1.0).draw_loss_args((5, 1, 1, 1))["is_interval"].all()
    model = prepared("DiT-S/2").eval()
    x_0, _, y = inputs(8)
    more = diffusion.draw_loss_args(x_0.shape, generator())
    batch = Batch(x_0, y, torch.linspace(0.2, 0.9, 8), randn(*x_0.shape, seed=5), more)
    objective = Objective(diffusion)
    together = objective(model, batch)["mse"]
    for part in (slice(0, 2), slice(2, 8)):  # in the first nobody's times differ
        more = {name: values[part] for name, values in batch.loss_args.items()}
        alone = objective(model, Batch(x_0[part], y[part], batch.t[part], batch.noise[part], more))["mse"]
        torch.testing.assert_close(alone, together[part], rtol=1e-4, atol=1e-6)


@kinds
def test_auxiliary_terms_apply_only_where_the_output_predicts_the_data(kind):
    term = Auxiliary("error", 1.0, lambda predicted, x_0, y: (predicted - x_0).square().mean(dim=(1, 2, 3)))
    error = losses(prepared("DiT-S/2"), kind(), auxiliary=[term])["error"]
    assert (error[:4] > 0).all()
    assert (error[4:] == 0).all()


class Guided(nn.Module):
    """Velocities that depend on the label (3 is the null label) but not on position; averages are ten times larger."""

    num_classes = 3

    def forward(self, x_t, t, y, *, r):
        return torch.zeros_like(x_t) + (y * torch.where(r < t, 10, 1))[:, None, None, None]


def test_meanflow_guidance_enters_the_learned_velocity():
    x_t, v, y, t = randn(3, 1, 2, 2), randn(3, 1, 2, 2, seed=1), torch.tensor([1, 2, 3]), torch.full((3,), 0.5)
    model = nn.Sequential(Guided())
    model.forward = model[0].forward  # wrapped
    guided = meanflow(omega=0.5, kappa=0.75).guided(model, x_t, t, v, y=y)
    for label, ours, plain in zip(y.tolist(), guided, v, strict=True):
        expected = plain if label == 3 else 0.5 * plain + 0.75 * label - 0.25 * 3
        torch.testing.assert_close(ours, expected)
    assert meanflow().guided(model, x_t, t, v, y=y) is v


def test_shortcut_guidance_enters_the_shortest_steps_only():
    x_t, y, r = randn(3, 1, 2, 2), torch.tensor([1, 2, 3]), torch.zeros(3)
    for length, expected in ((1 / 64, [2 * 1 - 3, 2 * 2 - 3, 3]), (1 / 32, [10, 20, 30])):
        target = shortcut(guidance_scale=2.0).average_velocity(
            Guided(), x_t, r + length, x_t, torch.arange(3), y=y, r=r
        )
        assert target[:, 0, 0, 0].tolist() == expected
