"""The objectives of diffusions: losses in closed form, times, weights, and the ends of the time range."""

import itertools
import math

import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import rescale_zero_terminal_snr
from exact import DIFFUSIONS, backbone, gaussian_data, generator, labels, randn

from diffusion import EDM, FlowMatching, GaussianDiffusion, sample
from diffusion.bound import normal_kl
from diffusion.diffusion import Auxiliary
from diffusion.paths import GaussianChain, VarianceExploding
from diffusion.sde import bits_per_dimension
from diffusion.weightings import WEIGHTINGS
from experiment.build import build_diffusion
from experiment.config import DiffusionConfig

MEAN, STD = 0.7, 0.4
SQUARE = MEAN**2 + STD**2  # E[x_0^2]
diffusions = pytest.mark.parametrize("diffusion", DIFFUSIONS)


def middle_and_ends(diffusion):
    """Times in the middle of the range and at both ends."""
    if isinstance(diffusion.path, GaussianChain):
        return torch.tensor([400, 0, 999])
    return torch.tensor([0.4, 0.002, 80.0] if isinstance(diffusion.path, VarianceExploding) else [0.4, 0.0, 1.0])


def silent(x, t, y):
    return torch.zeros_like(x)


SILENT_LOSSES = {  # E[target^2] at alpha, sigma
    "linear epsilon": lambda alpha, sigma: 1,
    "cosine v": lambda alpha, sigma: alpha**2 + sigma**2 * SQUARE,
    "sigmoid x_0": lambda alpha, sigma: SQUARE,
    "zero terminal SNR": lambda alpha, sigma: alpha**2 + sigma**2 * SQUARE,
    "linear flow": lambda alpha, sigma: 1 + SQUARE,
    "trigonometric flow": lambda alpha, sigma: (math.pi / 2) ** 2 * (alpha**2 + sigma**2 * SQUARE),
    "shifted flow": lambda alpha, sigma: 1 + SQUARE,
    "EDM": lambda alpha, sigma: (sigma**2 * SQUARE + 1) / (sigma**2 + 1),  # sigma_data = 1
}


@diffusions
def test_predicting_zero_costs_the_closed_form(diffusion):
    expected, diffusion = SILENT_LOSSES[diffusion], DIFFUSIONS[diffusion]()
    t = middle_and_ends(diffusion)
    x_0, noise = MEAN + STD * randn(3, 1, 250, 250), randn(3, 1, 250, 250, seed=1)
    loss = diffusion.training_loss(silent, x_0, labels(3), t=t, noise=noise)["loss"]
    closed = [float(expected(alpha, sigma)) for alpha, sigma in zip(*diffusion.path(t), strict=True)]
    assert loss.tolist() == pytest.approx(closed, rel=0.02)


@diffusions
def test_a_perfect_output_is_read_back(diffusion):
    diffusion = DIFFUSIONS[diffusion]()
    t, x_0, noise = middle_and_ends(diffusion)[:1], randn(1, 3, 2, 2), randn(1, 3, 2, 2, seed=1)
    x_t = diffusion.q_sample(x_0, t, noise)
    seen = diffusion.predict(diffusion.target(x_0, noise, t), x_t, t)
    torch.testing.assert_close(seen.x_0, x_0, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen.noise, noise, rtol=1e-4, atol=1e-5)


@diffusions
def test_no_model_does_better_than_the_posterior_mean(diffusion):
    diffusion = DIFFUSIONS[diffusion]()
    t, x_0, noise = middle_and_ends(diffusion)[:1], MEAN + STD * randn(1, 1, 250, 250), randn(1, 1, 250, 250, seed=1)
    model = backbone(diffusion, gaussian_data(MEAN, STD))

    def loss(model):
        return diffusion.training_loss(model, x_0, labels(1), t=t, noise=noise)["loss"].item()

    assert loss(model) < min(loss(lambda x, t, y: factor * model(x, t, y)) for factor in (0.9, 1.1))  # noqa: B023


@diffusions
def test_gradients_are_finite_at_both_ends_of_time_in_bfloat16(diffusion):
    diffusion = DIFFUSIONS[diffusion]()
    weight = torch.ones((), dtype=torch.bfloat16, requires_grad=True)
    x_0, t = randn(3, 1, 8, 8).bfloat16(), middle_and_ends(diffusion)
    terms = diffusion.training_loss(lambda x, t, y: weight * x.bfloat16(), x_0, labels(3), t=t, generator=generator())
    assert all(values.dtype == torch.float32 and values.isfinite().all() for values in terms.values())
    for loss in terms["loss"]:
        (gradient,) = torch.autograd.grad(loss, weight, retain_graph=True)
        assert gradient.isfinite()


# EDM: the error that a model expects of itself.


def test_uncertainty_starts_at_the_plain_loss_and_is_optimal_at_the_log_error():
    plain, diffusion = EDM(), EDM(uncertainty=True)
    assert diffusion.output_channels(4) == 5
    x_0, t, noise = randn(3, 2, 8, 8), middle_and_ends(plain), randn(3, 2, 8, 8, seed=1)

    def terms(u):
        model = lambda x, t, y: torch.cat([torch.zeros_like(x), u.expand(3, 1, 8, 8)], dim=1)  # noqa: E731
        return diffusion.training_loss(model, x_0, labels(3), t=t, noise=noise)

    mse = plain.training_loss(silent, x_0, labels(3), t=t, noise=noise)["mse"]
    torch.testing.assert_close(terms(torch.zeros(3, 1, 1, 1))["loss"], mse)
    u = mse.log()[:, None, None, None].requires_grad_()
    (gradient,) = torch.autograd.grad(terms(u)["loss"].sum(), u)
    torch.testing.assert_close(gradient, torch.zeros_like(u), atol=1e-6, rtol=0)
    assert terms(u)["uncertainty"].tolist() == pytest.approx(mse.log().tolist())
    assert (terms(u)["loss"] <= terms(u + 0.1)["loss"]).all()
    assert (terms(u)["loss"] <= terms(u - 0.1)["loss"]).all()


def test_uncertainty_leaves_samples_as_they_are():
    def unsure(x, t, y):
        return torch.cat([0.1 * x, torch.full_like(x[:, :1], 3.0)], dim=1)

    noise = randn(2, 3, 4, 4)
    same = {"sampler": "dpmpp_2m", "num_steps": 5, "guidance_scale": 2.0, "num_classes": 1}
    with_it = sample(EDM(uncertainty=True), unsure, noise, labels(2), **same)
    torch.testing.assert_close(with_it, sample(EDM(), lambda x, t, y: 0.1 * x, noise, labels(2), **same))


# Auxiliary terms.


@diffusions
def test_auxiliary_terms_are_weighted_by_the_signals_share(diffusion):
    diffusion = DIFFUSIONS[diffusion]()
    t, x_0, noise = middle_and_ends(diffusion), randn(3, 2, 4, 4), randn(3, 2, 4, 4, seed=1)
    term = Auxiliary("error", 0.1, lambda predicted, x_0, y: (predicted - x_0).square().mean(dim=(1, 2, 3)))
    plain = diffusion.training_loss(silent, x_0, labels(3), t=t, noise=noise)
    terms = diffusion.training_loss(silent, x_0, labels(3), t=t, noise=noise, auxiliary=[term])
    at, x_t = diffusion.path(t.double()), diffusion.q_sample(x_0, t, noise)
    share = at.alpha**2 / (at.alpha**2 + at.sigma**2)
    error = (diffusion.predict(torch.zeros_like(x_0), x_t, t).x_0 - x_0).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(terms["error"], (share * error).float(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(terms["loss"], plain["loss"] + 0.1 * terms["error"])
    assert terms["mse"].equal(plain["mse"])


# Gaussian: schedules, weights.


def test_zero_terminal_snr_equals_the_published_rescaling():
    plain = GaussianDiffusion(prediction="v").path.betas
    diffusion = GaussianDiffusion(prediction="v", zero_terminal_snr=True)
    torch.testing.assert_close(diffusion.path.betas, rescale_zero_terminal_snr(plain))
    assert diffusion.path.alphas_cumprod[-1] == 0
    assert diffusion.path.alphas_cumprod[0].item() == pytest.approx(1 - plain[0].item())
    with pytest.raises(ValueError, match=r"--diffusion.zero_terminal_snr true.*--diffusion.prediction v or x_0"):
        GaussianDiffusion(zero_terminal_snr=True)


def test_sigmoid_schedule_is_the_formula():
    diffusion = GaussianDiffusion("sigmoid", num_timesteps=100, prediction="v")

    def logistic(s):
        return 1 / (1 + math.exp(-3 + 6 * s))

    f = [(logistic(i / 100) - logistic(1)) / (logistic(0) - logistic(1)) for i in range(1, 100)]
    torch.testing.assert_close(diffusion.path.alphas_cumprod[:99], torch.tensor(f, dtype=torch.float64))


@pytest.mark.parametrize("prediction", ["epsilon", "x_0", "v"])
def test_weights_are_those_of_the_papers(prediction):
    """Weights of the output's squared error: for epsilon, min(SNR, 5) / SNR (Hang et al. 2023, section 3.4) and 1 / (1
    + SNR) (Choi et al. 2022, eq. 8); those of other predictions follow by conversion."""
    t = torch.tensor([5, 300, 990])
    snr = GaussianDiffusion().path.alphas_cumprod[t] / (1 - GaussianDiffusion().path.alphas_cumprod[t])
    worth = {"epsilon": 1, "x_0": snr, "v": snr / (1 + snr)}[prediction]
    for weighting, of_epsilon in {"min_snr": snr.clamp(max=5) / snr, "p2": 1 / (1 + snr)}.items():
        diffusion = GaussianDiffusion(prediction=prediction, variance="fixed_small", weighting=weighting)
        torch.testing.assert_close(diffusion.loss_weight(t), (of_epsilon * worth).float())


@pytest.mark.parametrize("prediction", ["epsilon", "x_0", "v"])
def test_vlb_weighting_makes_the_loss_the_kl_divergence(prediction):
    """T times the divergence between the true and the model's reverse step (Ho et al. 2020, eq. 5), for t above 0."""
    diffusion = GaussianDiffusion(prediction=prediction, variance="fixed_small", weighting="vlb")
    t, x_0, noise = torch.tensor([1, 200, 900]), randn(3, 1, 6, 6), randn(3, 1, 6, 6, seed=1)
    x_t, at = diffusion.q_sample(x_0, t, noise), diffusion.path.transition(t)
    seen = diffusion.predict(0.3 * x_t, x_t, t)
    variance = at.log_variance_min
    kl = normal_kl(at.posterior_mean(x_0, x_t), variance, at.posterior_mean(seen.x_0, x_t), variance)
    loss = diffusion.training_loss(lambda x, t, y: 0.3 * x, x_0, labels(3), t=t, noise=noise)["loss"]
    torch.testing.assert_close(loss, 1000 * kl.mean(dim=(1, 2, 3)), rtol=2e-3, atol=0)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_weights_leave_the_terms_as_they_are(weighting):
    diffusion, plain = GaussianDiffusion(weighting=weighting), GaussianDiffusion()
    x_0, t = randn(3, 1, 4, 4), torch.tensor([0, 500, 999])

    def terms(diffusion):
        return diffusion.training_loss(lambda x, t, y: torch.cat([x, x], 1), x_0, labels(3), t=t, generator=generator())

    ours, theirs = terms(diffusion), terms(plain)
    assert torch.equal(ours["mse"], theirs["mse"])
    assert torch.equal(ours["vb"], theirs["vb"])
    torch.testing.assert_close(ours["loss"], diffusion.loss_weight(t) * ours["mse"] + ours["vb"])


@pytest.mark.parametrize("path", ["linear", "trigonometric"])
def test_contrast_moves_the_best_velocity_away_from_the_negative(path):
    diffusion, t = FlowMatching(path, contrast=0.05), torch.tensor([0.2, 0.7])
    x_0, noise, negative = randn(2, 1, 4, 4), randn(2, 1, 4, 4, seed=1), randn(2, 2, 1, 4, 4, seed=2)
    own, other = diffusion.target(x_0, noise, t), diffusion.target(negative[:, 0], negative[:, 1], t)

    def loss(velocity, **more):
        terms = diffusion.training_loss(lambda *_: velocity, x_0, labels(2), t=t, noise=noise, **more)
        return terms["loss"]

    velocity = ((own - 0.05 * other) / 0.95).requires_grad_()
    errors = [(target - velocity).square().mean(dim=(1, 2, 3)) for target in (own, other)]
    contrasted = loss(velocity, negative=negative)
    torch.testing.assert_close(contrasted, errors[0] - 0.05 * errors[1])
    torch.testing.assert_close(loss(velocity), errors[0])  # as a validation has it
    contrasted.sum().backward()
    torch.testing.assert_close(velocity.grad, torch.zeros_like(velocity), atol=1e-6, rtol=0)


# Likelihood.


@diffusions
def test_likelihood_of_gaussian_data_is_the_density(diffusion):
    diffusion, x_0 = DIFFUSIONS[diffusion](), MEAN + STD * randn(3, 1, 8, 8)
    model = backbone(diffusion, gaussian_data(MEAN, STD))
    density = 0.5 * ((x_0 - MEAN) / STD) ** 2 + math.log(STD) + 0.5 * math.log(2 * math.pi)
    bits = bits_per_dimension(diffusion, model, x_0, labels(3), num_steps=100, generator=generator())
    torch.testing.assert_close(bits, density.mean(dim=(1, 2, 3)) / math.log(2), rtol=0, atol=0.002)


def test_hutchinson_s_estimate_is_unbiased():
    """With correlated dimensions a single probe is inexact, but the mean over all signs is exact."""
    mix = torch.linalg.qr(randn(4, 4))[0] @ torch.diag(torch.tensor([0.2, 0.5, 1.0, 1.5]))
    covariance = mix @ mix.T
    diffusion, x_0 = FlowMatching(), (randn(1, 4) @ mix.T)[:, :, None, None]

    def posterior_mean(x_t, alpha, sigma, y):
        kernel = alpha.flatten()[0] * covariance
        total = alpha.flatten()[0] ** 2 * covariance + sigma.flatten()[0] ** 2 * torch.eye(4)
        return (x_t.flatten(1) @ torch.linalg.solve(total, kernel).T)[:, :, None, None]

    exact = -torch.distributions.MultivariateNormal(torch.zeros(4), covariance).log_prob(x_0.flatten(1)) / 4
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=4)))[:, :, None, None]
    model, x_0 = backbone(diffusion, posterior_mean), x_0.expand(16, 4, 1, 1)
    bits = bits_per_dimension(diffusion, model, x_0, labels(16), num_steps=200, probe=signs)
    assert bits.std() > 0.01
    assert bits.mean().item() == pytest.approx(exact.item() / math.log(2), abs=0.005)


PAIRS = [
    (kind, prediction, loss)
    for kind in ("gaussian", "flow", "edm")
    for prediction in ("x_0", "epsilon", "v")
    for loss in ("x_0", "epsilon", "v")
]
IN_CLOSED_FORM = {
    "x_0": lambda x_0, noise, alpha, sigma: x_0,
    "epsilon": lambda x_0, noise, alpha, sigma: noise,
    "v": lambda x_0, noise, alpha, sigma: alpha * noise - sigma * x_0,
}


@pytest.mark.parametrize(("kind", "prediction", "loss"), PAIRS)
def test_what_is_predicted_and_what_the_loss_is_counted_in_are_two_choices(kind, prediction, loss):
    """The loss is the error of its own target, computed from the `x_0` and noise that the output implies."""
    settings = {"variance": "fixed_small"} if kind == "gaussian" else {}
    diffusion = build_diffusion(DiffusionConfig(kind=kind, prediction=prediction, loss=loss, **settings))
    t = {"gaussian": torch.tensor([5, 300, 900]), "edm": torch.tensor([0.05, 1.0, 20.0])}.get(
        kind, torch.tensor([0.05, 0.5, 0.95])
    )
    x_0, noise, output = (randn(3, 2, 4, 4, seed=seed).double() for seed in range(3))
    alpha, sigma = (number.double()[:, None, None, None] for number in diffusion.path(t.double()))
    x_t = alpha * x_0 + sigma * noise
    said = {  # two equations, for x_0 and noise
        "x_0": (output, (x_t - alpha * output) / sigma),
        "epsilon": ((x_t - sigma * output) / alpha, output),
        "v": (
            (alpha * x_t - sigma * output) / (alpha**2 + sigma**2),
            (sigma * x_t + alpha * output) / (alpha**2 + sigma**2),
        ),
    }[prediction]
    true, ours = (IN_CLOSED_FORM[loss](*pair, alpha, sigma) for pair in ((x_0, noise), said))
    expected = (true - ours).square().mean(dim=(1, 2, 3))
    seen = diffusion.training_loss(lambda x, t, y: output.float(), x_0.float(), labels(3), t=t, noise=noise.float())
    torch.testing.assert_close(seen["loss"].double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("kind", "own"), [("flow", "velocity"), ("edm", "F")])
@pytest.mark.parametrize("prediction", ["x_0", "epsilon", "v"])
def test_a_loss_in_a_paths_own_target_equals_that_of_predicting_the_target(kind, own, prediction):
    names = (own, prediction)
    plain, other = (build_diffusion(DiffusionConfig(kind=kind, prediction=name, loss=own)) for name in names)
    t = torch.tensor([0.05, 0.5, 0.95])
    x_0, noise, guess = (randn(3, 2, 4, 4, seed=seed) for seed in range(3))
    x_t, at = plain.q_sample(x_0, t, noise), plain.path.levels(t)
    outputs = [each.target(guess, (x_t - at.alpha * guess) / at.sigma, t) for each in (plain, other)]
    pairs = zip((plain, other), outputs, strict=True)
    losses = [
        diffusion.terms(output, diffusion.target(x_0, noise, t), x_0, x_t, t)["loss"] for diffusion, output in pairs
    ]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-6)


def test_prediction_loss_pairs_have_finite_weights_and_refuse_contradictions():
    flow = FlowMatching(prediction="x_0", loss="v")
    assert flow.loss_weight(torch.tensor([0.0, 1.0])).isfinite().all()
    with pytest.raises(ValueError, match=r"--diffusion.loss v beside --diffusion.weighting min_snr: leave one"):
        GaussianDiffusion(loss="v", weighting="min_snr")
    with pytest.raises(ValueError, match=r"--diffusion.loss score: unknown, choose from epsilon, x_0, v, velocity"):
        FlowMatching(loss="score")


@pytest.mark.parametrize("prediction", ["x_0", "epsilon", "v", "velocity"])
def test_a_flow_is_sampled_whatever_is_predicted(prediction):
    """Also from pure noise, where a predicted noise says nothing about the data."""
    diffusion = FlowMatching(prediction=prediction)
    drawn = sample(
        diffusion,
        backbone(diffusion, gaussian_data(MEAN, STD)),
        randn(4, 1, 64, 64),
        labels(4),
        sampler="euler",
        num_steps=100,
    )
    assert drawn.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert drawn.std().item() == pytest.approx(STD, rel=0.03)


def test_extras_reach_the_model_untouched():
    seen = []

    def model(x, t, y, **extras):
        seen.append(extras)
        return x

    augmented = torch.tensor([1, 2])
    for diffusion in (GaussianDiffusion(variance="fixed_small"), FlowMatching(), EDM()):
        diffusion.training_loss(model, randn(2, 1, 4, 4), labels(2), extras={"augmented": augmented})
        assert seen[-1] == {"augmented": augmented}
