"""The training loss: cross-entropy on both of its paths, and what the sums are divided by."""

import pytest
import torch
import torch.nn.functional as F
from small_models import seeded

from transfusion_fast.model.loss import Counts, combine, token_cross_entropy

PATHS = pytest.mark.parametrize(("vocabulary", "width"), [(8, 8), (5000, 16)])  # the second one in chunks


def cross_entropy(hidden, weight, labels):
    return token_cross_entropy(hidden, weight, labels)[0]


def inputs(positions, vocabulary, width, dtype=torch.float32):
    generator = seeded()
    hidden, weight = (torch.randn(n, width, generator=generator).to(dtype) for n in (positions, vocabulary))
    labels = torch.randint(vocabulary, (positions,), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def plain(hidden, weight, labels):
    return F.cross_entropy(hidden.float() @ weight.float().T, labels, reduction="none")


def with_gradients(function, hidden, weight, labels):
    """Return losses and gradients, each position weighted differently."""
    losses = function(hidden, weight, labels)
    return [losses, *torch.autograd.grad(losses, (hidden, weight), torch.linspace(-1, 2, len(losses)))]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of 32 positions of a vocabulary of 5000."""
    monkeypatch.setattr("transfusion_fast.model.loss._CHUNK", 32 * 5000)


@PATHS
@pytest.mark.parametrize("positions", [0, 1, 100])
def test_token_cross_entropy_is_cross_entropy_of_the_logits(vocabulary, width, positions, tolerance):
    case = inputs(positions, vocabulary, width)
    got, expected = with_gradients(cross_entropy, *case), with_gradients(plain, *case)
    torch.testing.assert_close(got, expected, **tolerance["fp32"])


@PATHS
def test_token_cross_entropy_of_half_precision_is_near_and_single_precision(vocabulary, width, tolerance):
    case = inputs(50, vocabulary, width, torch.bfloat16)
    got, expected = with_gradients(cross_entropy, *case), with_gradients(plain, *case)
    assert got[0].dtype == torch.float32
    torch.testing.assert_close(got[0], expected[0], **tolerance["bf16"])
    for a, b in zip(got[1:], expected[1:], strict=True):
        assert (a.float() - b.float()).norm() <= tolerance["bf16"]["rtol"] * b.float().norm()


@PATHS
def test_logit_cap_and_z_loss_are_those_of_double_precision(vocabulary, width, tolerance):
    hidden, weight, labels = inputs(100, vocabulary, width)
    scales = torch.linspace(-1, 2, 100), torch.linspace(3, -1, 100)
    losses = token_cross_entropy(hidden, weight, labels, logit_cap=3.0, z_loss=0.1)
    got = [*losses, *torch.autograd.grad(losses, (hidden, weight), scales)]
    hidden, weight = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    logits = 3 * (hidden @ weight.T / 3).tanh()
    losses = F.cross_entropy(logits, labels, reduction="none"), 0.1 * logits.logsumexp(1) ** 2
    expected = [*losses, *torch.autograd.grad(losses, (hidden, weight), [x.double() for x in scales])]
    torch.testing.assert_close(got, [x.float() for x in expected], **tolerance["fp32"])


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
def test_autocast_gives_the_values_and_gradients_of_inputs_in_its_dtype(hidden_dtype, tolerance):
    hidden, weight, labels = inputs(50, 5000, 16, torch.bfloat16)
    expected = with_gradients(cross_entropy, hidden, weight, labels)
    hidden, weight = hidden.detach().to(hidden_dtype).requires_grad_(), weight.detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        losses = cross_entropy(hidden, weight, labels)
    got = [losses, *torch.autograd.grad(losses, (hidden, weight), torch.linspace(-1, 2, len(losses)))]
    assert got[1].dtype == hidden_dtype and got[2].dtype == torch.float32
    torch.testing.assert_close([x.float() for x in got], [x.float() for x in expected], **tolerance["fp32"])


def test_values_of_a_large_vocabulary_have_single_precision_given_logits_in_half_precision():
    """Rounded to half precision, values near 8 would be multiples of 1/32."""
    hidden, weight, labels = inputs(50, 5000, 16, torch.bfloat16)
    expected = F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="none")
    torch.testing.assert_close(cross_entropy(hidden, weight, labels), expected, rtol=1e-5, atol=1e-5)


def test_gradients_of_many_chunks_are_as_accurate_as_those_of_all_logits_at_once(monkeypatch):
    monkeypatch.setattr("transfusion_fast.model.loss._CHUNK", 5000)  # one position

    def at_once(hidden, weight, labels):
        return F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="none")

    case = inputs(300, 5000, 16, torch.bfloat16)
    exact = with_gradients(plain, *(x.detach().float().requires_grad_() for x in case[:2]), case[2])[1:]
    ours, theirs = (
        [float((a - b).norm() / b.norm()) for a, b in zip(with_gradients(function, *case)[1:], exact, strict=True)]
        for function in (cross_entropy, at_once)
    )
    assert ours == pytest.approx(theirs, rel=0.03)


def test_a_large_vocabulary_never_has_all_its_logits_in_memory():
    hidden, weight, labels = inputs(320, 5000, 16)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as trace:
        cross_entropy(hidden, weight, labels).sum().backward()
    largest = max(event.nbytes() for event in trace.profiler.kineto_results.events() if event.name() == "[memory]")
    assert largest <= 4 * 32 * 5000 < 4 * 320 * 5000


def test_the_compiler_takes_the_cross_entropy_of_a_large_vocabulary_in_one_graph(tolerance):
    case = inputs(40, 5000, 16)
    compiled = torch.compile(cross_entropy, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(
        with_gradients(compiled, *case), with_gradients(cross_entropy, *case), **tolerance["fp32"]
    )


def combined(token_losses, image_losses, counts=None, **others):
    weights = torch.ones(len(image_losses))
    return combine(token_losses, image_losses, image_losses, 5.0, counts, image_weights=weights, **others)


@pytest.mark.parametrize(("counts", "text", "diffusion"), [(None, 3.0, 1.0), (Counts(tokens=90, images=8), 0.1, 0.25)])
def test_sums_are_divided_by_the_given_counts_or_by_the_batchs_own(counts, text, diffusion):
    losses = combined(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0.5, 1.5]), counts)
    assert [loss.item() for loss in losses[:3]] == pytest.approx([text, diffusion, text + 5 * diffusion])
    assert losses.counts == Counts(tokens=3, images=2)


def test_the_z_loss_is_part_of_the_total_alone():
    plain, z = (combined(torch.ones(3), torch.ones(2), z_losses=z) for z in (None, torch.tensor([1.0, 2.0, 3.0])))
    assert (z.text, z.diffusion) == (plain.text, plain.diffusion)
    assert z.total.item() == pytest.approx(plain.total.item() + 2)


@pytest.mark.parametrize("counts", [None, Counts(0, 0)])
def test_nothing_to_learn_from_is_a_loss_of_zero(counts):
    losses = combined(torch.zeros(0), torch.zeros(0), counts)
    assert [loss.item() for loss in losses[:3]] == [0, 0, 0]


def test_weights_count_in_every_part_of_the_loss_and_in_that_of_each_image():
    tokens, z_losses, images = torch.tensor([1.0, 2, 4]), torch.tensor([0.1, 0.2, 0.4]), torch.tensor([1.0, 3])
    weights = {"token_weights": torch.tensor([0.5, 0, 2]), "image_weights": torch.tensor([0.25, 0.5])}
    losses = combine(tokens, images, 2 * images, 5.0, None, z_losses=z_losses, **weights)
    text, diffusion = (0.5 * 1 + 2 * 4) / 2.5, 2 * (0.25 * 1 + 0.5 * 3) / 0.75
    assert (losses.text.item(), losses.diffusion.item()) == pytest.approx((text, diffusion))
    assert losses.total.item() == pytest.approx(text + 5 * diffusion + text / 10)
    assert losses.per_image.tolist() == [0.25, 1.5]
