"""Every diffusion with every sampler and spacing, on data with a known denoiser."""

import math

import pytest
import torch
from exact import DIFFUSIONS, backbone, gaussian_data, generator, labels, randn

from diffusion import EDM, SAMPLERS, SPACINGS, FlowMatching, GaussianDiffusion, sample
from diffusion.paths import VarianceExploding
from diffusion.spacings import spaced_times
from models import create_model

MEAN, STD = 0.7, 0.4
diffusions = pytest.mark.parametrize("diffusion", DIFFUSIONS)
LEVELS = "14.615 6.475 3.861 2.697 1.886 1.396 0.963 0.652 0.399 0.152 0.029 0"  # a table of noise levels


def draw(diffusion, noise, **settings):
    model = backbone(diffusion, gaussian_data(MEAN, STD))
    return sample(diffusion, model, noise, labels(len(noise)), generator=generator(1), **settings)


@diffusions
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_pairing_reaches_mean_and_std(diffusion, sampler):
    num_steps = 400 if sampler == "ddpm" else 150  # its error is of first order, and its noise adds to it
    x_0 = draw(DIFFUSIONS[diffusion](), randn(4, 1, 64, 64), sampler=sampler, num_steps=num_steps)
    assert x_0.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert x_0.std().item() == pytest.approx(STD, abs=0.02)


@diffusions
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_backbone_in_float32_stays_in_it(diffusion, sampler):
    """A real backbone, which outputs zeros as long as it is untrained, with every refinement of guidance."""
    diffusion = DIFFUSIONS[diffusion]()
    sizes = {"input_size": 4, "in_channels": 4, "out_channels": diffusion.output_channels(4), "num_classes": 3}
    model = create_model("DiT", **sizes, dim=16, depth=2, num_heads=2).eval()
    settings = {"num_steps": 5, "sampler_args": {"churn": 10.0} if sampler == "heun" else {}, "guidance_scale": 2.0}
    settings |= {"guidance_interval": [0.1, 10.0], "guidance_rescale": 0.5, "guidance_parallel": 0.0}
    settings |= {"guidance_radius": 3.0}
    x_0 = sample(diffusion, model, randn(2, 4, 4, 4).float(), labels(2), sampler=sampler, **settings)
    assert x_0.dtype == torch.float32
    assert x_0.isfinite().all()


@diffusions
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_predictions_are_cut_to_what_data_can_be(diffusion, sampler):
    diffusion = DIFFUSIONS[diffusion]()
    beyond = backbone(diffusion, lambda x_t, alpha, sigma, y: torch.full_like(x_t, 3.0))  # pixels end at 1
    settings = {"sampler": sampler, "num_steps": 7}
    x_0 = sample(diffusion, beyond, randn(2, 1, 4, 4), labels(2), clip=1.0, generator=generator(), **settings)
    torch.testing.assert_close(x_0, torch.ones_like(x_0))
    unlimited = draw(diffusion, randn(2, 1, 4, 4), clip=math.inf, **settings)
    torch.testing.assert_close(unlimited, draw(diffusion, randn(2, 1, 4, 4), **settings), rtol=1e-3, atol=1e-3)


@diffusions
@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_spacing_reaches_mean_and_std(diffusion, spacing):
    diffusion = DIFFUSIONS[diffusion]()
    if isinstance(diffusion.path, VarianceExploding) and spacing in ("uniform", "trailing"):
        pytest.skip("even steps in sigma up to 80 leave one for the data's own scale: the reason for the others")
    x_0 = draw(diffusion, randn(4, 1, 64, 64), sampler="unipc", spacing=spacing, num_steps=150)
    assert x_0.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert x_0.std().item() == pytest.approx(STD, abs=0.02)


@diffusions
@pytest.mark.parametrize("spacing", [*SPACINGS, "table"])
@pytest.mark.parametrize("num_steps", [1, 2, 7, 50])
def test_spaced_times_ascend_to_the_last(diffusion, spacing, num_steps, tmp_path):
    diffusion = DIFFUSIONS[diffusion]()
    if spacing == "table":
        (tmp_path / "levels.txt").write_text(LEVELS)
        spacing = str(tmp_path / "levels.txt")
    times = spaced_times(diffusion.path, num_steps, spacing)
    assert times.shape == (num_steps,)
    assert (times.diff() > 0).all()
    assert times[-1] == diffusion.path.max_time
    alpha, sigma = diffusion.path(times)
    assert (sigma > 0).all()
    assert ((alpha / sigma).diff() < 0).all()


def test_karras_levels_are_the_formula():
    times = spaced_times(EDM().path, 18, "karras").tolist()
    for i, sigma in enumerate(reversed(times)):
        assert sigma == pytest.approx((80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7, rel=1e-6)


def test_trailing_times_are_those_of_the_paper():
    """Lin et al. 2023, table 2: T = 1000, 10 steps."""
    assert spaced_times(GaussianDiffusion().path, 10, "trailing").tolist() == list(range(99, 1000, 100))


def test_a_table_of_noise_levels_is_used_or_interpolated(tmp_path):
    path = tmp_path / "levels.txt"
    path.write_text("80, 1, 0.0125\n0")
    diffusion = EDM(sigma_min=0.0125, sigma_max=80.0)
    assert spaced_times(diffusion.path, 3, str(path)).tolist() == pytest.approx([0.0125, 1, 80])
    assert spaced_times(diffusion.path, 5, str(path)).tolist() == pytest.approx([0.0125, 0.0125**0.5, 1, 80**0.5, 80])
    path.write_text("80, one")
    with pytest.raises(ValueError, match="not a list of numbers"):
        spaced_times(diffusion.path, 3, str(path))
    path.write_text("80")
    with pytest.raises(ValueError, match="two or more different"):
        spaced_times(diffusion.path, 3, str(path))
    with pytest.raises(ValueError, match=r"--spacing even: unknown, choose from uniform, trailing"):
        spaced_times(diffusion.path, 3, "even")


ORDERS = {"ddim": 1, "euler": 1, "heun": 2, "dpmpp_2m": 2, "unipc": 3, "exponential_ab3": 3}


@pytest.mark.parametrize("diffusion", ["cosine v", "linear flow", "trigonometric flow", "EDM"])
@pytest.mark.parametrize("sampler", ORDERS)
def test_deterministic_samplers_have_their_order(diffusion, sampler):
    """Error against the exact solution of the probability-flow equation, over all levels, since at a single one its
    leading term may vanish. UniPC's corrector lifts its order of 2 by one (Zhao et al. 2023, theorem 3.1)."""
    diffusion = DIFFUSIONS[diffusion]()
    noise = torch.randn(1, 1, 16, 16, dtype=torch.float64, generator=generator())
    diffusion.path.noise_range = (0.05, 50.0)
    diffusion.path.max_time = diffusion.path.time_at(torch.tensor(50.0, dtype=torch.float64)).item()

    def spread(at):
        return ((at.alpha * STD) ** 2 + at.sigma**2).sqrt()

    def error(num_steps):
        seen = []
        steps = diffusion.reverse_steps(num_steps, "log_snr")
        draw(
            diffusion,
            noise,
            sampler=sampler,
            num_steps=num_steps,
            spacing="log_snr",
            callback=lambda step, x_t, x_0: seen.append(x_t),
        )
        start = steps[0][1]
        wrong = [
            x_t - at.alpha * MEAN - spread(at) / spread(start) * (diffusion.path.prior_std * noise - start.alpha * MEAN)
            for (_, at), x_t in zip(steps[1:], seen[:-1], strict=True)
        ]
        return torch.stack(wrong).square().mean().sqrt().item()

    assert math.log2(error(40) / error(80)) == pytest.approx(ORDERS[sampler], abs=0.3)


@pytest.mark.parametrize("churn", [40.0])
@pytest.mark.parametrize("diffusion", ["cosine v", "linear flow", "EDM"])
def test_churn_leaves_the_distribution_as_it_is(diffusion, churn):
    diffusion, noise = DIFFUSIONS[diffusion](), randn(4, 1, 64, 64)
    settings = {"sampler": "heun", "num_steps": 200}
    churned = draw(diffusion, noise, sampler_args={"churn": churn}, **settings)
    assert churned.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert churned.std().item() == pytest.approx(STD, abs=0.02)
    plain = draw(diffusion, noise, **settings)
    assert torch.corrcoef(torch.stack([churned.flatten(), plain.flatten()]))[0, 1] < 0.9


@diffusions
def test_the_backbone_is_given_times_from_0_to_999(diffusion):
    diffusion, seen = DIFFUSIONS[diffusion](), []

    def model(x, t, y):
        seen.append(t)
        return torch.zeros_like(x)

    sample(diffusion, model, randn(2, 1, 2, 2), labels(2), num_steps=10, spacing="log_snr")
    times = torch.stack(seen)
    assert times.max() == pytest.approx(999)
    assert 0 <= times.min() < 5
    assert (times == times[:, :1]).all()


def test_the_input_of_edm_has_unit_variance_at_every_level():
    diffusion, x_0 = EDM(sigma_data=0.5), 0.5 * randn(1, 1, 200, 200)
    for sigma in (0.002, 0.5, 80.0):
        t, inputs = torch.tensor([sigma]), []
        diffusion.training_loss(
            lambda x, t, y: inputs.append(x) or torch.zeros_like(x),  # noqa: B023
            x_0,
            labels(1),
            t=t,
            noise=randn(1, 1, 200, 200, seed=1),
        )
        assert inputs[0].std().item() == pytest.approx(1, abs=0.02)
        target = diffusion.target(x_0, randn(1, 1, 200, 200, seed=1), t)
        assert target.std().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
    ("diffusion", "sampler"), [("linear flow", "euler"), ("EDM", "heun"), ("linear epsilon", "ddpm")]
)
def test_each_process_has_a_sampler_of_its_own(diffusion, sampler):
    diffusion, noise = DIFFUSIONS[diffusion](), randn(2, 1, 4, 4)
    assert torch.equal(draw(diffusion, noise, num_steps=9), draw(diffusion, noise, num_steps=9, sampler=sampler))


def test_flows_refuse_what_they_cannot_do_in_words():
    for arguments, words in [
        ({"path": "cubic"}, "--diffusion.path cubic: unknown, choose from linear, trigonometric"),
        ({"times": "beta"}, "--diffusion.times beta: unknown, choose from uniform, logit_normal, mode, cosmap"),
        ({"times_args": {"scale": 2.0}}, "--diffusion.times_args.scale: uniform takes no arguments"),
        ({"times": "mode", "times_args": {"scale": 2}}, r"--diffusion.times_args.scale 2: must lie in \[-1, 1.7519\]"),
        (
            {"contrast": 0.05, "prediction": "v"},
            "--diffusion.contrast 0.05: is not for --diffusion.prediction v",
        ),
        ({"shift": 0.0}, r"--diffusion.shift 0.0 must be above 0"),
    ]:
        with pytest.raises(ValueError, match=words):
            FlowMatching(**arguments)
    with pytest.raises(ValueError, match=r"--diffusion.sigma_max 0.001 must lie above --diffusion.sigma_min 0.002"):
        EDM(sigma_max=0.001)
    with pytest.raises(ValueError, match=r"--diffusion.sigma_data -1.0 must be above 0"):
        EDM(sigma_data=-1.0)
    for diffusion in (FlowMatching(), EDM()):
        with pytest.raises(ValueError, match=r"--num_steps 0 must be at least 1"):
            diffusion.reverse_steps(0)
