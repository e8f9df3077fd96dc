"""Samplers: they find what they should, from every prediction and at every noise level."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
)
from diffusion_cases import DDPM, FLOW, SPACES, each_noise, each_prediction, fp64, images, levels, make, predict
from small_models import seeded

from transfusion_fast.sampling import samplers


def steps_back(diffusion, count):
    return pairwise(diffusion.sampling_timesteps(count, 1))


def step(diffusion, x_t, prediction, t, t_next, *, eta=0.0, noise=None, clip=None):
    """Return the step of the model's prediction."""
    x_0 = diffusion.denoised(x_t, prediction, t)
    x_0 = x_0 if clip is None else x_0.clamp(-clip, clip)
    return samplers.step(diffusion, x_t, x_0, t, t_next, eta=eta, noise=noise)


@each_prediction
@each_noise
@pytest.mark.parametrize("count", [1, 7])
def test_with_a_perfect_prediction_any_start_stays_on_the_path_of_its_noise_to_the_image(noise, prediction, count):
    diffusion = make(noise, prediction=prediction)
    x_0, x = torch.randn(5, dtype=torch.float64), 10 * torch.randn(5, dtype=torch.float64)
    signal, spread = diffusion.variances(diffusion.first_timestep())
    eps = (x - signal.sqrt() * x_0) / spread.sqrt()
    for t, t_next in steps_back(diffusion, count):
        alpha, sigma = (level.sqrt() for level in diffusion.variances(t))
        v = alpha * eps - sigma * x_0
        exact = {"eps": eps, "x0": x_0, "v": v, "velocity": eps - x_0 if noise == "flow" else v}[prediction]
        x = step(diffusion, x, exact, t, t_next, eta=0.0)
        torch.testing.assert_close(x, diffusion.add_noise(x_0, eps, fp64(t_next)), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(x, x_0, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("clip", [None, 0.5])
@each_noise
def test_a_step_is_the_same_from_every_prediction_of_one_estimate(noise, clip):
    x_t, estimate, new = images().float()
    alpha, sigma = levels(noise, 600)
    eps = (x_t - alpha * estimate) / sigma
    steps = [
        step(make(noise, prediction=p), x_t, predict(p, noise, estimate, eps, 600), 600, 400, noise=new, clip=clip)
        for p in SPACES
    ]
    for other in steps[1:]:
        torch.testing.assert_close(other, steps[0], rtol=1e-5, atol=1e-5)
    kept = estimate if clip is None else estimate.clamp(-clip, clip)
    alpha_next, sigma_next = levels(noise, 400)
    if noise == "flow":  # a step of ddpm is tested below
        expected = alpha_next * kept + sigma_next * (x_t - alpha * kept) / sigma
        torch.testing.assert_close(steps[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddpm_sampling_with_the_exact_prediction_draws_from_the_data(eta):
    """Data N(2, 0.5^2): the mean of eps given x_t is sqrt(1 - a) (x_t - 2 sqrt(a)) / (0.25 a + 1 - a)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(10_000, generator=generator, dtype=torch.float64)
    for t, t_next in steps_back(DDPM, 250):
        a = DDPM.alpha_bar(t)
        prediction = (1 - a).sqrt() * (x - 2 * a.sqrt()) / (0.25 * a + 1 - a)
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        x = step(DDPM, x, prediction, t, t_next, eta=eta, noise=noise)
    assert x.mean().item() == pytest.approx(2.0, abs=0.02)
    assert x.std().item() == pytest.approx(0.5, rel=0.03)


def test_an_ancestral_step_has_the_posteriors_mean_and_variance(tolerance):
    """q(x_{t-1} | x_t, x_0) as DDPM writes it, in terms of beta (arXiv 2006.11239, equation 7)."""
    (x_0, x_t), t = fp64(0.7, -0.4), 600
    now, after = DDPM.alpha_bar(t), DDPM.alpha_bar(t - 1)
    beta = 1 - now / after
    mean = (after.sqrt() * beta * x_0 + (1 - beta).sqrt() * (1 - after) * x_t) / (1 - now)
    variance = (1 - after) / (1 - now) * beta
    prediction = (x_t - now.sqrt() * x_0) / (1 - now).sqrt()
    at_mean, one_away = (step(DDPM, x_t, prediction, t, t - 1, eta=1.0, noise=noise) for noise in fp64(0, 1))
    torch.testing.assert_close(at_mean, mean, **tolerance["fp64"])
    torch.testing.assert_close((one_away - at_mean) ** 2, variance, **tolerance["fp64"])


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, 1.5, 1e3])
def test_a_step_keeps_the_noise_level_of_its_timestep_for_any_eta(eta, tolerance):
    """Noise is replaced in proportion to eta (arXiv 2010.02502, equation 16), in the end all of it."""
    (x_0, eps), now_bar, after_bar = fp64(0.7, -0.4), *DDPM.alpha_bar(fp64(600, 550))
    x_t = DDPM.add_noise(x_0, eps, fp64(600)[0])
    kept, moved = (step(DDPM, x_t, eps, 600, 550, eta=eta, noise=noise) for noise in fp64(0, 1))
    old, new = (kept - after_bar.sqrt() * x_0) / eps, moved - kept
    torch.testing.assert_close(old**2 + new**2, 1 - after_bar, **tolerance["fp64"])
    ancestral = (1 - after_bar) / (1 - now_bar) * (1 - now_bar / after_bar)  # that of eta 1
    torch.testing.assert_close(new**2, (eta**2 * ancestral).clamp_max(1 - after_bar), **tolerance["fp64"])
    assert (old == 0) == (eta > 100) and (new == 0) == (eta == 0)


def test_clip_bounds_the_image_that_is_predicted():
    """Flow: from x_t = 5 and velocity 2 at t = 1/2, x_0 is 4, and half of the way to it is 4.5; to 1 it is 3."""
    x_t, now, after = torch.tensor([5.0, -5.0, 0.1]), DDPM.alpha_bar(500).item(), DDPM.alpha_bar(250).item()
    x_0 = torch.tensor([1.0, -1.0, 0.1 / now**0.5])
    path = after**0.5 * x_0 + (1 - after) ** 0.5 * (x_t - now**0.5 * x_0) / (1 - now) ** 0.5
    for t_next, expected in ((0, x_0), (250, path)):
        torch.testing.assert_close(step(DDPM, x_t, torch.zeros(3), 500, t_next, eta=0.0, clip=1.0), expected)
    assert step(DDPM, x_t, torch.zeros(3), 500, 0, eta=0.0)[0] > 5
    for clip, expected in ((None, 4.5), (1.0, 3.0), (9.0, 4.5)):
        got = step(FLOW, torch.tensor(5.0), torch.tensor(2.0), 500, 250, clip=clip)
        assert got.item() == pytest.approx(expected)


def test_a_random_step_without_noise_is_refused():
    with pytest.raises(ValueError, match="noise must be given unless eta is 0"):
        step(DDPM, torch.zeros(3), torch.zeros(3), 500, 250, eta=1.0)


@each_noise
@each_prediction
def test_samplers_start_where_little_signal_is_left_and_a_small_error_stays_small(noise, prediction):
    diffusion = make(noise, prediction=prediction)
    first = diffusion.first_timestep()
    last_with_signal = {"cosine": 997, "linear": 1000, "flow": 996}[noise]
    assert first == (last_with_signal if prediction == "eps" else 1000) and diffusion.variances(first)[0] < 1e-4
    at = [step(diffusion, fp64(0.0), fp64(error), first, 0.0, eta=0.0) for error in (0.0, 1.0)]
    assert abs(at[1] - at[0]) < (256 if prediction == "eps" else 1.01)


NAMES = ("ddpm", "ddim", "euler", "heun", "dpm++")
each_sampler = pytest.mark.parametrize("sampler", NAMES)


def drawn(sampler, diffusion, x, denoise, steps, *, timesteps=None, **settings):
    """Return the image that a sampler draws from x in `steps` evaluations."""
    intervals = samplers.num_intervals(sampler, steps)
    timesteps = diffusion.sampling_timesteps(intervals, 1) if timesteps is None else timesteps
    return samplers.draw(sampler, diffusion, x, timesteps, denoise, steps, **settings)


@each_sampler
@each_noise
@each_prediction
@pytest.mark.parametrize("steps", [1, 2, 3, 8])
def test_every_sampler_evaluates_as_often_as_asked_and_finds_the_image_of_a_perfect_model(
    noise, prediction, sampler, steps
):
    diffusion, times = make(noise, prediction=prediction), []
    x_0, x = torch.randn(2, 5, generator=seeded(0), dtype=torch.float64)
    got = drawn(sampler, diffusion, x, lambda x, t: times.append(t) or x_0, steps, eta=0.0)
    torch.testing.assert_close(got, x_0, rtol=1e-10, atol=1e-10)
    assert len(times) == steps and times[0] == diffusion.first_timestep() and times[-1] > 0
    assert times == sorted(times, reverse=True)


@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("euler", 1), ("heun", 2), ("dpm++", 2)])
@pytest.mark.parametrize("diffusion", [DDPM, FLOW], ids=["ddpm", "flow"])
def test_the_error_falls_with_the_order_of_the_sampler(sampler, order, diffusion):
    """Data N(2, 0.5^2): the exact solution keeps (x - 2 alpha) / sqrt(alpha^2 / 4 + sigma^2)."""
    first, last = 900.0, 300.0

    def spread(t):
        alpha, sigma = diffusion.levels(t)
        return (0.25 * alpha**2 + sigma**2) ** 0.5

    def denoise(x, t):
        alpha, _ = diffusion.levels(t)
        return 2 + 0.25 * alpha / spread(t) ** 2 * (x - 2 * alpha)

    x, errors = fp64(-1.0, 0.5, 2.0), []
    exact = 2 * diffusion.levels(last)[0] + (x - 2 * diffusion.levels(first)[0]) * spread(last) / spread(first)
    for count in (40, 80):
        timesteps = torch.linspace(first, last, count + 1, dtype=torch.float64).tolist()
        got = drawn(sampler, diffusion, x, denoise, 2 * count if sampler == "heun" else count, timesteps=timesteps)
        errors.append((got - exact).abs().max().item())
    assert errors[0] < (0.05 if order == 1 else 0.002)
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.15)


COSINE = {"beta_schedule": "squaredcos_cap_v2"}
LINEAR = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
WHOLE = {"timestep_spacing": "trailing"}  # timesteps are entries of the table, and not between them
CLEAN = {"prediction_type": "sample"}
SECOND_ORDER = {"lower_order_final": False}  # in all steps but the last, however few there are
FLOW_PREDICTION = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 1}


@pytest.mark.parametrize("steps", [1, 2, 4, 20])
@pytest.mark.parametrize(
    ("sampler", "noise", "scheduler"),
    [
        ("ddpm", "cosine", DDPMScheduler(**COSINE, **WHOLE, **CLEAN, clip_sample=False)),
        ("ddpm", "linear", DDPMScheduler(**LINEAR, **WHOLE, **CLEAN, clip_sample=False)),
        ("ddim", "cosine", DDIMScheduler(**COSINE, **WHOLE, **CLEAN, clip_sample=False)),
        ("euler", "linear", EulerDiscreteScheduler(**LINEAR, **WHOLE, **CLEAN)),
        ("heun", "linear", HeunDiscreteScheduler(**LINEAR, **WHOLE)),
        ("dpm++", "cosine", DPMSolverMultistepScheduler(**COSINE, **WHOLE, **CLEAN, **SECOND_ORDER)),
        ("dpm++", "linear", DPMSolverMultistepScheduler(**LINEAR, **WHOLE, **CLEAN, **SECOND_ORDER)),
        ("euler", "flow", FlowMatchEulerDiscreteScheduler()),
        ("heun", "flow", FlowMatchHeunDiscreteScheduler()),
        ("dpm++", "flow", DPMSolverMultistepScheduler(**FLOW_PREDICTION, **SECOND_ORDER)),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_steps_are_those_of_diffusers_for_the_same_predictions(sampler, noise, scheduler, steps):
    """Timesteps are those of the scheduler, whose tables begin at our t = 1 and are made fp64 here."""
    diffusion = make(noise, prediction="velocity" if noise == "flow" else "eps")
    if noise != "flow":
        table = diffusion.alpha_bar(torch.arange(1, 1001))
        torch.testing.assert_close(scheduler.alphas_cumprod.double(), table, rtol=1e-5, atol=1e-6)
        scheduler.alphas_cumprod = table
    scheduler.set_timesteps(steps)
    listed = [float(t) + 1 for t in scheduler.timesteps]
    if noise == "flow":
        listed = [1000 * float(sigma) for sigma in scheduler.sigmas[:-1]]
    elif hasattr(scheduler, "sigmas"):
        levels_at = [diffusion.levels(t) for t in (*listed, 0)]
        scheduler.sigmas = fp64(*(sigma / alpha for alpha, sigma in levels_at))
    times = [*dict.fromkeys(listed), 0.0]
    x, *new = torch.randn(1 + steps, 4, 16, generator=seeded(0), dtype=torch.float64)

    def denoise(x, t):
        return 0.8 * (x + t / 300).tanh()

    ours = {"timesteps": times, "noise": partial(next, iter(new))}
    got = drawn(sampler, diffusion, x, denoise, len(listed), **ours)
    sample, theirs = x, iter(new)
    scaled = sampler in ("euler", "heun") and noise != "flow"  # these schedulers work with x / alpha
    sample = x / diffusion.levels(times[0])[0] if scaled else x
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: next(theirs))
        for number, t in zip(listed, scheduler.timesteps, strict=True):
            x_t = scheduler.scale_model_input(sample, t) if scaled else sample
            alpha, sigma = diffusion.levels(number)
            x_0 = denoise(x_t, number)
            prediction = (x_t - (1 if noise == "flow" else alpha) * x_0) / sigma
            prediction = x_0 if scheduler.config.get("prediction_type") == "sample" else prediction
            sample = scheduler.step(prediction, t, sample).prev_sample
    torch.testing.assert_close(got, sample.double(), rtol=1e-5, atol=1e-5)
