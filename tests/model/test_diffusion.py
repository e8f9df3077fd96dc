"""The two diffusion objectives: the paper's schedule, and samplers that find what they should."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from transfusion_fast.model.diffusion import NUM_TIMESTEPS, OBJECTIVES, CosineDDPM, FlowMatching

DDPM = CosineDDPM()
ALMOST_ONE = 1 - 2**-24  # the largest fp32 number that torch.rand gives
uniforms = st.one_of(st.floats(0, ALMOST_ONE, width=32), st.sampled_from([0.0, 2**-24, ALMOST_ONE]))


def fp64(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_alpha_bar_is_the_product_of_one_minus_the_clipped_betas():
    """Improved DDPM defines the schedule by its betas, none above 0.999. The clean end is exactly clean."""

    def f(t):
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    product = DDPM.alpha_bar(0).item()
    assert product == 1.0
    for t in range(1, NUM_TIMESTEPS + 1):
        product *= 1 - min(1 - f(t) / f(t - 1), 0.999)
        assert DDPM.alpha_bar(t).item() == pytest.approx(product, rel=1e-9)


@given(uniforms, st.floats(1, NUM_TIMESTEPS))
def test_ddpm_timesteps_are_whole_and_at_most_the_cap(u, cap):
    t = DDPM.timesteps(torch.tensor([u]), fp64(cap))
    assert t.dtype == torch.float32
    assert t.item() in range(1, math.floor(cap) + 1)


@given(uniforms, st.floats(10, NUM_TIMESTEPS), st.sampled_from([0.5, 1.0, 3.0]))
def test_flow_timesteps_are_above_zero_and_at_most_the_cap(u, cap, shift):
    t = FlowMatching(shift).timesteps(torch.tensor([u]), fp64(cap)).double().item()
    assert 0 < t <= cap * (1 + 1e-6)


@pytest.mark.parametrize("cap", [1000, 7])
def test_ddpm_timesteps_are_uniform_over_the_whole_steps_up_to_the_cap(cap):
    u = (torch.arange(3 * cap, dtype=torch.float64) + 0.5) / (3 * cap)
    steps, counts = DDPM.timesteps(u, cap).unique(return_counts=True)
    assert steps.tolist() == list(range(1, cap + 1))
    assert (counts == 3).all()


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_timesteps_are_logit_normal_and_shifted_towards_noise(shift, tolerance):
    """The u-th quantile is sigmoid of the normal's."""
    u = torch.linspace(0.001, 0.999, 500)
    t = torch.sigmoid(torch.distributions.Normal(0.0, 1.0).icdf(u.double()))
    expected = 1000 * shift * t / (1 + (shift - 1) * t)
    torch.testing.assert_close(FlowMatching(shift).timesteps(u), expected.float(), **tolerance["fp32"])


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_capped_flow_timesteps_are_those_below_the_cap(shift):
    """As if drawn without a cap, and drawn again while above it."""
    objective = FlowMatching(shift)
    u = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    uncapped = objective.timesteps(u)
    kept = uncapped[uncapped <= 500]
    quantiles = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    capped = objective.timesteps(quantiles, 500)
    torch.testing.assert_close(capped, kept.quantile(quantiles), rtol=5e-3, atol=0.5)


def test_each_image_has_its_own_cap():
    u, caps = torch.full((3,), ALMOST_ONE), torch.tensor([1000.0, 500.0, 20.0])
    assert DDPM.timesteps(u, caps).tolist() == [1000, 500, 20]
    assert (FlowMatching().timesteps(u, caps) <= caps).all()


@given(st.integers(1, NUM_TIMESTEPS))
def test_ddpm_noise_preserves_the_variance(t):
    signal, noise = (DDPM.add_noise(*fp64(*pair), torch.tensor(float(t))).item() for pair in ((1, 0), (0, 1)))
    assert signal**2 + noise**2 == pytest.approx(1.0, rel=1e-12)
    assert signal**2 == pytest.approx(DDPM.alpha_bar(t).item(), rel=1e-9)


def test_flow_noise_is_the_straight_line_and_its_target_the_slope_and_ddpm_predicts_the_noise():
    x_0, eps = torch.tensor([2.0, -1.0]), torch.tensor([-4.0, 3.0])
    assert FlowMatching().add_noise(x_0, eps, torch.tensor([250.0, 1000.0])).tolist() == [0.5, 3.0]
    assert FlowMatching().target(x_0, eps, torch.tensor(250.0)).tolist() == [-6.0, 4.0]
    assert DDPM.target(x_0, eps, torch.tensor(250.0)).tolist() == [-4.0, 3.0]


def oracle(objective, x_0, x_t, t):
    """Return what a perfect model predicts where x_0 is the only image there is."""
    if isinstance(objective, FlowMatching):
        return (x_t - x_0) / (t / NUM_TIMESTEPS)
    alpha_bar = objective.alpha_bar(t)
    return (x_t - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt()


def steps_back(objective, count):
    return pairwise(torch.linspace(objective.first_timestep(), 0, count + 1).tolist())


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("count", [1, 2, 50])
def test_with_a_perfect_prediction_any_start_stays_on_the_path_of_its_noise_to_the_image(objective, count):
    torch.manual_seed(0)
    x_0, x = torch.randn(5, dtype=torch.float64), 10 * torch.randn(5, dtype=torch.float64)
    predicted = oracle(objective, x_0, x, objective.first_timestep())
    eps = predicted + x_0 if isinstance(objective, FlowMatching) else predicted
    for t, t_next in steps_back(objective, count):
        x = objective.step(x, oracle(objective, x_0, x, t), t, t_next, eta=0.0)
        torch.testing.assert_close(x, objective.add_noise(x_0, eps, fp64(t_next)), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(x, x_0, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddpm_sampling_with_the_exact_prediction_draws_from_the_data(eta):
    """Data N(2, 0.5^2): the mean of eps given x_t is sqrt(1 - a) (x_t - 2 sqrt(a)) / (0.25 a + 1 - a)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(10_000, generator=generator, dtype=torch.float64)
    for t, t_next in steps_back(DDPM, 250):
        a = DDPM.alpha_bar(t)
        prediction = (1 - a).sqrt() * (x - 2 * a.sqrt()) / (0.25 * a + 1 - a)
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        x = DDPM.step(x, prediction, t, t_next, eta=eta, noise=noise)
    assert x.mean().item() == pytest.approx(2.0, abs=0.02)
    assert x.std().item() == pytest.approx(0.5, rel=0.03)


def test_an_ancestral_step_has_the_posteriors_mean_and_variance(tolerance):
    """q(x_{t-1} | x_t, x_0) as DDPM writes it, in terms of beta (arXiv 2006.11239, equation 7)."""
    (x_0, x_t), t = fp64(0.7, -0.4), 600
    now, after = DDPM.alpha_bar(t), DDPM.alpha_bar(t - 1)
    beta = 1 - now / after
    mean = (after.sqrt() * beta * x_0 + (1 - beta).sqrt() * (1 - after) * x_t) / (1 - now)
    variance = (1 - after) / (1 - now) * beta
    prediction = oracle(DDPM, x_0, x_t, t)
    at_mean, one_away = (DDPM.step(x_t, prediction, t, t - 1, eta=1.0, noise=noise) for noise in fp64(0, 1))
    torch.testing.assert_close(at_mean, mean, **tolerance["fp64"])
    torch.testing.assert_close((one_away - at_mean) ** 2, variance, **tolerance["fp64"])


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, 1.5, 1e3])
def test_a_step_keeps_the_noise_level_of_its_timestep_for_any_eta(eta, tolerance):
    """A larger eta replaces more of the noise, in the end all of it."""
    (x_0, eps), now, after = fp64(0.7, -0.4), 600, fp64(550)
    x_t = DDPM.add_noise(x_0, eps, fp64(now))
    kept, moved = (DDPM.step(x_t, eps, now, 550, eta=eta, noise=noise) for noise in fp64(0, 1))
    old, new = (kept - DDPM.alpha_bar(after).sqrt() * x_0) / eps, moved - kept
    torch.testing.assert_close(old**2 + new**2, 1 - DDPM.alpha_bar(after), **tolerance["fp64"])
    assert (old == 0) == (eta > 100) and (new == 0) == (eta == 0)


def test_clip_bounds_the_image_that_is_predicted():
    """Flow: from x_t = 5 and velocity 2 at t = 1/2, x_0 is 4, and half of the way to it is 4.5; to 1 it is 3."""
    x_t, now, after = torch.tensor([5.0, -5.0, 0.1]), DDPM.alpha_bar(500).item(), DDPM.alpha_bar(250).item()
    x_0 = torch.tensor([1.0, -1.0, 0.1 / now**0.5])
    path = after**0.5 * x_0 + (1 - after) ** 0.5 * oracle(DDPM, x_0, x_t, 500).float()
    for t_next, expected in ((0, x_0), (250, path)):
        torch.testing.assert_close(DDPM.step(x_t, torch.zeros(3), 500, t_next, eta=0.0, clip=1.0), expected)
    assert DDPM.step(x_t, torch.zeros(3), 500, 0, eta=0.0)[0] > 5
    for clip, expected in ((None, 4.5), (1.0, 3.0), (9.0, 4.5)):
        got = FlowMatching().step(torch.tensor(5.0), torch.tensor(2.0), 500, 250, clip=clip)
        assert got.item() == pytest.approx(expected)


def test_a_random_step_without_noise_is_refused():
    with pytest.raises(ValueError, match="noise must be given unless eta is 0"):
        DDPM.step(torch.zeros(3), torch.zeros(3), 500, 250, eta=1.0)


def test_samplers_start_where_the_signal_is_gone():
    assert DDPM.first_timestep() == NUM_TIMESTEPS - 1 and DDPM.alpha_bar(NUM_TIMESTEPS - 1) < 1e-5
    assert FlowMatching().first_timestep() == NUM_TIMESTEPS
