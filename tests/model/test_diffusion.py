"""Diffusion: noise levels, timesteps, predictions and their losses, and samplers that find what they should."""

import math
import pickle
import re
import warnings
from itertools import product

import pytest
import torch
from diffusion_cases import DDPM, FLOW, SPACES, each_noise, each_prediction, fp64, images, levels, make, predict
from hypothesis import given
from hypothesis import strategies as st

from transfusion_fast import Transfusion
from transfusion_fast.diffusion_config import DiffusionConfig
from transfusion_fast.model import ops
from transfusion_fast.model.diffusion import NUM_TIMESTEPS, Diffusion
from transfusion_fast.sampling.samplers import step

ALMOST_ONE = 1 - 2**-24  # the largest fp32 number that torch.rand gives
uniforms = st.one_of(st.floats(0, ALMOST_ONE, width=32), st.sampled_from([0.0, 2**-24, ALMOST_ONE]))

OFFSETS = torch.tensor([0, 2, 5], dtype=torch.int32)
PAIR = torch.tensor([100.0, 700.0])


@pytest.mark.parametrize("noise", ["cosine", "linear"])
def test_alpha_bar_is_the_product_of_one_minus_the_betas(noise):
    """Improved DDPM clips those of the cosine schedule at 0.999. The clean end is exactly clean."""
    diffusion = make(noise)
    assert diffusion.alpha_bar(0).item() == 1.0
    for t in (1, 2, 10, 500, 999, 1000):
        alpha, sigma = levels(noise, t)
        assert diffusion.alpha_bar(t).item() == pytest.approx(alpha**2, rel=1e-9)
        assert 1 - diffusion.alpha_bar(t).item() == pytest.approx(sigma**2, rel=1e-6)
    fine = diffusion.alpha_bar(torch.linspace(0, 1000, 100_001, dtype=torch.float64))
    assert (fine.diff() <= 0).all() and (fine <= 1).all(), "falls between whole steps too"


@given(
    uniforms,
    st.floats(1, NUM_TIMESTEPS),
    st.sampled_from([0.3, 1.0, 3.0]),
    st.sampled_from(["uniform", "logit_normal"]),
)
def test_ddpm_timesteps_are_whole_and_at_most_the_cap(u, cap, shift, timesteps):
    t = make(shift=shift, timesteps=timesteps).training_timesteps(torch.tensor([u]), 1, fp64(cap))
    assert t.dtype == torch.float32
    assert t.item() in range(1, math.floor(cap) + 1)


@given(
    uniforms,
    st.floats(1, NUM_TIMESTEPS),
    st.sampled_from([0.5, 1.0, 3.0]),
    st.sampled_from(["uniform", "logit_normal"]),
)
def test_flow_timesteps_are_above_zero_and_at_most_the_cap(u, cap, shift, timesteps):
    t = (
        make("flow", shift=shift, timesteps=timesteps)
        .training_timesteps(torch.tensor([u]), 1, fp64(cap))
        .double()
        .item()
    )
    assert 0 < t <= cap * (1 + 1e-6)


@pytest.mark.parametrize("cap", [1000, 7])
def test_ddpm_timesteps_are_uniform_over_the_whole_steps_up_to_the_cap(cap):
    u = (torch.arange(3 * cap, dtype=torch.float64) + 0.5) / (3 * cap)
    steps, counts = DDPM.training_timesteps(u, 1, cap).unique(return_counts=True)
    assert steps.tolist() == list(range(1, cap + 1))
    assert (counts == 3).all()


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_timesteps_are_logit_normal_and_shifted_towards_noise(shift, tolerance):
    """The u-th quantile is sigmoid of the normal's. Uniform ones are a setting."""
    u = torch.linspace(0.001, 0.999, 500)
    normal = torch.sigmoid(torch.distributions.Normal(0.0, 1.0).icdf(u.double()))
    for timesteps, t in ((None, normal), ("uniform", u.double())):
        expected = 1000 * shift * t / (1 + (shift - 1) * t)
        got = make("flow", shift=shift, timesteps=timesteps).training_timesteps(u, 1)
        torch.testing.assert_close(got, expected.float(), **tolerance["fp32"])


@pytest.mark.parametrize("settings", [{}, {"shift": 3.0}, {"shift": 3.0, "timesteps": "uniform"}])
@pytest.mark.parametrize("noise", ["cosine", "flow"])
def test_capped_timesteps_are_those_below_the_cap(noise, settings):
    """As if drawn without a cap, and drawn again while above it."""
    diffusion = make(noise, **settings)
    u = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    uncapped = diffusion.training_timesteps(u, 1)
    kept = uncapped[uncapped <= 500]
    quantiles = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    capped = diffusion.training_timesteps(quantiles, 1, 500)
    torch.testing.assert_close(capped, kept.quantile(quantiles), rtol=5e-3, atol=1.0)


def test_each_image_has_its_own_cap_and_its_own_shift(tolerance):
    u, caps = torch.full((3,), ALMOST_ONE), torch.tensor([1000.0, 500.0, 20.0])
    assert DDPM.training_timesteps(u, 1, caps).tolist() == [1000, 500, 20]
    assert (FLOW.training_timesteps(u, 1, caps) <= caps).all()
    shifted = make("flow", shift=2.0, shift_patches=64).training_timesteps(
        torch.full((3,), 0.3), torch.tensor([64, 256, 16])
    )
    alone = [make("flow", shift=shift).training_timesteps(torch.tensor([0.3]), 1) for shift in (2.0, 4.0, 1.0)]
    torch.testing.assert_close(shifted, torch.cat(alone), **tolerance["fp32"])


@pytest.mark.parametrize(
    ("noise", "prediction", "first"),
    [("cosine", "v", 1000), ("linear", "eps", 1000), ("cosine", "eps", 997), ("flow", None, 1000)],
)
def test_a_sampler_visits_shifted_timesteps_between_the_first_and_zero(noise, prediction, first):
    """A shift by s multiplies t / (first - t) by s."""
    even, shifted = (
        make(noise, prediction=prediction, shift_patches=base).sampling_timesteps(4, 144) for base in (None, 16)
    )
    assert even == pytest.approx([first * k / 4 for k in (4, 3, 2, 1, 0)])
    assert shifted == pytest.approx([first * 3 * k / (4 + 2 * k) for k in (4, 3, 2, 1, 0)])


@each_noise
def test_noise_has_the_published_levels(noise):
    for t in (1, 300, 999):
        x_t = [
            make(noise).add_noise(*fp64(*pair), torch.tensor(t, dtype=torch.float64)).item()
            for pair in ((1, 0), (0, 1))
        ]
        assert x_t == pytest.approx(levels(noise, t), rel=1e-6)


def by_image(function, *tensors):
    """Return function(*tensors, t) of the patches of each image at its timestep."""
    return torch.cat(
        [function(*parts, t) for *parts, t in zip(*(x.split([2, 3]) for x in tensors), PAIR.tolist(), strict=True)]
    )


def losses(diffusion, prediction, x_0, eps):
    return diffusion.losses(*(x.float() for x in (prediction, x_0, eps)), PAIR, OFFSETS)


@each_noise
def test_the_velocity_is_the_derivative_of_the_noisy_image(noise, tolerance):
    """By t from 0 to 1 for flow; by the angle for ddpm. It has no error."""
    (x_0, eps, _), diffusion, h = images(), make(noise, prediction="velocity"), 1e-3

    def derivative(x_0, eps, t):
        before, after = (fp64(t + sign * h) for sign in (-1, 1))
        rise = diffusion.add_noise(x_0, eps, after) - diffusion.add_noise(x_0, eps, before)
        angles = [torch.atan((sigma / alpha).sqrt()) for alpha, sigma in map(diffusion.variances, (before, after))]
        return rise / (2 * h / 1000 if noise == "flow" else angles[1] - angles[0])

    assert losses(diffusion, by_image(derivative, x_0, eps), x_0, eps).max() < 1e-9


@pytest.mark.parametrize("weighting", ["none", "min_snr"])
@each_prediction
@each_noise
def test_an_exact_prediction_has_no_loss_and_that_of_another_does_not_depend_on_width(noise, prediction, weighting):
    for loss in SPACES:
        diffusion, found = make(noise, prediction=prediction, loss=loss, weighting=weighting), []
        for width in (1, 300):
            x_0, eps, _ = images(width)
            exact = by_image(lambda *pair: predict(prediction, noise, *pair), x_0, eps)
            assert losses(diffusion, exact, x_0, eps).max() < 1e-11
            found.append(losses(diffusion, exact + 0.5, x_0, eps))
        torch.testing.assert_close(*found, rtol=1e-5, atol=0)


@pytest.mark.parametrize("loss", SPACES)
@each_noise
def test_one_estimate_has_the_same_loss_whatever_the_model_predicts(noise, loss):
    """It is the squared error of the estimate in the space of the loss."""
    x_0, eps, estimate = images()

    def implied(space, x_0, eps, estimate, t):
        alpha, sigma = levels(noise, t)
        return predict(space, noise, estimate, (alpha * x_0 + sigma * eps - alpha * estimate) / sigma, t)

    def in_space(space):
        return by_image(lambda *parts: implied(space, *parts), x_0, eps, estimate)

    truth = by_image(lambda *pair: predict(loss, noise, *pair), x_0, eps)
    expected = torch.stack([e.square().mean() for e in (in_space(loss) - truth).split([2, 3])]).float()
    for prediction in SPACES:
        got = losses(make(noise, prediction=prediction, loss=loss), in_space(prediction), x_0, eps)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)


@each_noise
def test_min_snr_weighs_as_its_paper_in_every_space(noise):
    """min(SNR, 5) for x0, min(SNR, 5) / SNR for eps, min(SNR, 5) / (SNR + 1) for v, which preserves the variance."""
    times = torch.tensor([1.0, 300.0, 999.0])
    for k, t in enumerate(times.tolist()):
        alpha, sigma = levels(noise, t)
        snr = (alpha / sigma) ** 2
        expected = {"x0": min(snr, 5), "eps": min(snr, 5) / snr, "v": min(snr, 5) / (snr + 1) / (alpha**2 + sigma**2)}
        expected["velocity"] = min(snr, 5) * sigma**2 if noise == "flow" else expected["v"]
        for prediction, loss in product(SPACES, (None, *SPACES)):
            weights = make(noise, prediction=prediction, loss=loss, weighting="min_snr").weights(times)
            assert weights[k].item() == pytest.approx(expected[prediction], rel=1e-5)


def test_the_loss_of_velocity_from_the_image_is_weighted_by_the_clipped_time_of_jit():
    weights = make("flow", prediction="x0", loss="velocity").weights(torch.tensor([1e-30, 10.0, 50.0, 100.0, 1000.0]))
    assert weights.tolist() == pytest.approx([400, 400, 400, 100, 1])


@each_noise
def test_weights_are_finite_over_all_timesteps(noise):
    ends = torch.tensor([1.0, 1000.0] if noise != "flow" else [torch.finfo(torch.float32).tiny, 1.0, 1000.0])
    for prediction, loss, weighting in product(SPACES, SPACES, ("none", "min_snr")):
        weights = make(noise, prediction=prediction, loss=loss, weighting=weighting).weights(ends)
        assert weights is None or (weights.isfinite().all() and weights.max() <= 400.01)


def test_the_default_loss_is_the_error_of_the_noise_alone_and_one_of_the_image_reads_no_noise():
    x_0, eps, prediction = images().float()
    nothing = torch.full_like(x_0, float("nan"))
    got = DDPM.losses(prediction, nothing, eps, PAIR, OFFSETS)
    assert torch.equal(got, ops.diffusion_mse(prediction, eps, OFFSETS))
    got = make(prediction="x0").losses(prediction, x_0, nothing, PAIR, OFFSETS)
    assert torch.equal(got, ops.diffusion_mse(prediction, x_0, OFFSETS))
    got = FLOW.losses(prediction, x_0, eps, PAIR, OFFSETS)
    assert torch.equal(got, ops.diffusion_mse_from_noise(prediction, x_0, eps, OFFSETS))


@pytest.mark.parametrize(
    "settings", [{}, {"prediction": "v", "loss": "x0"}, {"process": "flow", "weighting": "min_snr"}]
)
def test_losses_compile_in_one_graph(settings):
    diffusion = Diffusion(DiffusionConfig(**settings))
    x_0, eps, prediction = images().float()
    compiled = torch.compile(diffusion.losses, fullgraph=True, backend="eager")
    torch.testing.assert_close(
        compiled(prediction, x_0, eps, PAIR, OFFSETS), diffusion.losses(prediction, x_0, eps, PAIR, OFFSETS)
    )


def behaviour(diffusion):
    """Return all that a diffusion decides, as numbers. The loss is quadratic: its gradients at 0 and 1 say of what."""
    x_0, eps, _ = images(seed=1).float()

    def gradient(value):
        prediction = torch.full_like(x_0, value, requires_grad=True)
        return torch.autograd.grad(diffusion.losses(prediction, x_0, eps, PAIR, OFFSETS).sum(), prediction)[0]

    at_zero, at_one = gradient(0.0), gradient(1.0)
    return {
        "timesteps": diffusion.training_timesteps(torch.tensor([0.1, 0.6]), 64),
        "noise": by_image(lambda *pair: diffusion.add_noise(*pair[:2], fp64(pair[2])), x_0, eps),
        "target": at_zero / (at_zero - at_one),
        "weight": at_one - at_zero,
        "visited": torch.tensor(diffusion.sampling_timesteps(3, 64)),
        "step": step(diffusion, x_0, diffusion.denoised(x_0, eps, 600), 600, 200, eta=0.5, noise=torch.ones_like(x_0)),
    }


@pytest.mark.parametrize(
    ("settings", "other", "changed"),
    [
        ({}, {"schedule": "cosine", "prediction": "eps", "loss": "eps", "timesteps": "uniform"}, ""),
        ({}, {"schedule": "linear"}, "noise visited step"),
        ({"prediction": "v"}, {"schedule": "linear", "prediction": "v"}, "noise target step"),
        ({}, {"prediction": "x0"}, "target visited step"),
        ({"prediction": "x0"}, {"prediction": "v"}, "target step"),
        ({}, {"prediction": "x0", "loss": "eps"}, "target weight visited step"),
        ({"prediction": "v"}, {"prediction": "velocity"}, ""),
        ({}, {"loss": "x0"}, "weight"),
        ({}, {"timesteps": "logit_normal"}, "timesteps"),
        ({}, {"shift": 2.0}, "timesteps visited"),
        ({}, {"shift_patches": 16}, "timesteps visited"),
        ({"shift": 2.0}, {"shift": 1.0, "shift_patches": 16}, ""),
        ({}, {"shift_patches": 64}, ""),
        ({}, {"weighting": "min_snr"}, "weight"),
        ({"weighting": "min_snr"}, {"weighting": "min_snr", "loss": "x0"}, ""),
        ({"process": "flow"}, {"process": "flow", "prediction": "velocity", "timesteps": "logit_normal"}, ""),
        ({"process": "flow"}, {"process": "flow", "prediction": "v"}, "target step"),
        ({"process": "flow"}, {"process": "flow", "loss": "v"}, "weight"),
        ({"process": "flow"}, {"process": "flow", "timesteps": "uniform"}, "timesteps"),
        ({"process": "flow"}, {"process": "flow", "shift_patches": 4}, "timesteps visited"),
    ],
)
def test_a_setting_changes_what_it_should_and_nothing_else(settings, other, changed):
    before, after = (behaviour(Diffusion(DiffusionConfig(**s))) for s in (settings, other))
    same = [name for name in before if torch.allclose(before[name], after[name], rtol=1e-4, atol=1e-4)]
    assert set(before) - set(same) == set(changed.split())


def test_a_schedule_with_flow_is_refused_and_data_workers_can_be_sent_one():
    with pytest.raises(ValueError, match="schedule must be left out with process=flow, which has none, got linear"):
        DiffusionConfig(process="flow", schedule="linear")
    sent = pickle.loads(pickle.dumps(make("linear", shift=2.0)))
    assert torch.equal(
        sent.training_timesteps(torch.tensor([0.3]), 1), make(shift=2.0).training_timesteps(torch.tensor([0.3]), 1)
    )


def test_noise_or_a_velocity_predicted_for_wide_patches_is_warned_of_once_in_one_line():
    sizes = {"num_text_tokens": 5, "transformer": {"dim": 8, "depth": 1, "heads": 1, "ffn_dim": 8}}
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("default")
        for prediction in ("eps", "eps", "v", "velocity"):
            Transfusion(dim_latent=(4, 257), diffusion={"prediction": prediction}, **sizes)
    warned = [str(one.message) for one in found]
    assert [message.split()[0] for message in warned] == ["eps", "v", "velocity"]
    assert re.fullmatch(r"eps should be .* at most 256 values, got 257; set .*=x0 and .*", warned[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Transfusion(dim_latent=256, **sizes)
        Transfusion(dim_latent=768, diffusion={"prediction": "x0", "loss": "velocity"}, **sizes)
        Transfusion(dim_latent=[], **sizes)
