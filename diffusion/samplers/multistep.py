"""Multistep samplers, which reuse earlier predictions: exponential integrators in `lambda = log(alpha / sigma)`.

With `h` the increase of lambda in a step, the exact solution is `x_s = sigma_s / sigma_t x_t + alpha_s h integral of
e^(-h (1 - u)) x_0(u) du`, u from 0 at t to 1 at s (Lu et al. 2022b, eq. 8). Samplers differ in the polynomial that they
fit to the predictions of `x_0`. In the step to the data, h is infinite and the polynomial a constant.
"""

from torch import Tensor

from diffusion.samplers.chain import Chain, Trajectory
from diffusion.transition import Images, Transition

Earlier = tuple[Tensor, Tensor]
"""`x_0` predicted at an earlier time, and h of the step from there."""


def dpmpp_2m(chain: Chain, x_t: Images) -> Trajectory:
    """DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2): each step also uses the previous prediction of `x_0`."""
    earlier = None
    for t, at in chain.steps:
        x_0 = chain.denoise(x_t, t, at).x_0
        constant = extrapolate(x_0, at, earlier)
        x_t = at.sigma_next / at.sigma * x_t + at.alpha_next * (1 - at.exp_neg_h) * constant
        earlier = x_0, at.h
        yield x_t, x_0


def dpmpp_2m_sde(chain: Chain, x_t: Images) -> Trajectory:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022b, section 5): the same for the reverse-time SDE."""
    earlier = None
    for t, at in chain.steps:
        x_0 = chain.denoise(x_t, t, at).x_0
        constant, decay = extrapolate(x_0, at, earlier), at.exp_neg_h**2
        x_t = at.sigma_next / at.sigma * at.exp_neg_h * x_t + at.alpha_next * (1 - decay) * constant
        if at.sigma_next > 0:
            x_t = x_t + at.sigma_next * (1 - decay).sqrt() * chain.draw_noise()
        earlier = x_0, at.h
        yield x_t, x_0


def dpmpp_3m(chain: Chain, x_t: Images) -> Trajectory:
    """DPM-Solver++(3M) as published (Lu et al. 2022b, appendix B, and its code).

    It fits a parabola to the last three predictions and halves its quadratic term. That makes it of order 2, but with
    less error than `exponential_ab3` at 20 to 40 steps.
    """
    return integrate_parabolas(chain, x_t, curvature_weight=0.5)


def exponential_ab3(chain: Chain, x_t: Images) -> Trajectory:
    """Exponential Adams-Bashforth method of order 3 (Hochbruck and Ostermann 2010, section 2.5)."""
    return integrate_parabolas(chain, x_t, curvature_weight=1.0)


def integrate_parabolas(chain: Chain, x_t: Images, curvature_weight: float) -> Trajectory:
    """Integrate a parabola through the last three predictions, its quadratic term scaled by `curvature_weight`. The
    first two steps and the step to the data are of lower order."""
    earlier: list[Earlier] = []  # newest first
    for t, at in chain.steps:
        x_0 = chain.denoise(x_t, t, at).x_0
        slope = curvature = 0.0
        if earlier and at.sigma_next > 0:
            (x_0_1, h_1), *older = earlier
            slope = (x_0 - x_0_1) * (at.h / h_1)
            if older:
                ((x_0_2, h_2),) = older
                slope, curvature = fit_parabola(x_0, (-h_1 / at.h, x_0_1), (-(h_1 + h_2) / at.h, x_0_2))
        x_t = integrate(x_t, at, x_0, slope, curvature_weight * curvature)
        earlier = [(x_0, at.h), *earlier[:1]]
        yield x_t, x_0


def unipc(chain: Chain, x_t: Images) -> Trajectory:
    """UniPC of order 2 with B(h) = e^h - 1 (Zhao et al. 2023, algorithms 1 and 2).

    The predictor is DPM-Solver++(2M). The corrector reuses the prediction at the end of the step, without a further
    call of the model.
    """
    earlier, last_step = None, None
    for t, at in chain.steps:
        x_0 = chain.denoise(x_t, t, at).x_0
        if last_step is not None:
            x_t = correct(*last_step, x_0)
        last_step = x_t, at, x_0, earlier
        constant = extrapolate(x_0, at, earlier)
        x_t = at.sigma_next / at.sigma * x_t + at.alpha_next * (1 - at.exp_neg_h) * constant
        earlier = x_0, at.h
        yield x_t, x_0


def extrapolate(x_0: Tensor, at: Transition, earlier: Earlier | None) -> Tensor:
    """Extrapolate `x_0` linearly, from its predictions here and one step earlier, to the middle of the step."""
    if earlier is None or at.sigma_next == 0:
        return x_0
    x_0_before, h_before = earlier
    return x_0 + at.h / (2 * h_before) * (x_0 - x_0_before)


def correct(x_t: Tensor, at: Transition, x_0: Tensor, earlier: Earlier | None, x_0_after: Tensor) -> Tensor:
    """Repeat a step from `x_t`, now that the prediction at its end, `x_0_after`, is known."""
    if earlier is None:
        return at.sigma_next / at.sigma * x_t + at.alpha_next * (1 - at.exp_neg_h) * (x_0 + x_0_after) / 2
    x_0_before, h_before = earlier
    return integrate(x_t, at, x_0, *fit_parabola(x_0, (1.0, x_0_after), (-h_before / at.h, x_0_before)))


def fit_parabola(
    x_0: Tensor, near: tuple[Tensor | float, Tensor], far: tuple[Tensor | float, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return slope and curvature of a parabola from `x_0` through two points (u, value); the far u may be infinite."""
    (u_1, x_0_1), (u_2, x_0_2) = near, far
    first, second = (x_0_1 - x_0) / u_1, (x_0_2 - x_0) / u_2
    curvature = (second - first) / (u_2 - u_1)
    return first - u_1 * curvature, curvature


def integrate(x_t: Tensor, at: Transition, x_0: Tensor, slope: Tensor | float, curvature: Tensor | float) -> Tensor:
    """Return the exact solution of a step along which `x_0` is a parabola in u."""
    phi_1 = 1 - at.exp_neg_h  # integrals of h e^(-h (1 - u)) times 1, u and u^2
    phi_2 = 1 - phi_1 / at.h
    phi_3 = 1 - 2 * phi_2 / at.h
    return at.sigma_next / at.sigma * x_t + at.alpha_next * (phi_1 * x_0 + phi_2 * slope + phi_3 * curvature)
