"""The training loss: cross-entropy on both of its paths, and what the sums are divided by."""

import pytest
import torch
import torch.nn.functional as F

from transfusion_fast.model.loss import Counts, combine, token_cross_entropy

PATHS = pytest.mark.parametrize(("vocabulary", "width"), [(8, 8), (300, 16), (5000, 16)])  # the last one in chunks


def inputs(positions, vocabulary, width, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(positions, width, generator=generator).to(dtype)
    weight = torch.randn(vocabulary, width, generator=generator).to(dtype)
    labels = torch.randint(vocabulary, (positions,), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def plain(hidden, weight, labels):
    return F.cross_entropy(hidden.float() @ weight.float().T, labels, reduction="none")


def with_gradients(function, hidden, weight, labels):
    """Losses and gradients, each position weighted differently."""
    losses = function(hidden, weight, labels)
    return [losses, *torch.autograd.grad(losses, (hidden, weight), torch.linspace(-1, 2, len(losses)))]


@PATHS
@pytest.mark.parametrize("positions", [1, 7, 100])
def test_token_cross_entropy_is_cross_entropy_of_the_logits(vocabulary, width, positions, tolerance):
    case = inputs(positions, vocabulary, width)
    for got, expected in zip(with_gradients(token_cross_entropy, *case), with_gradients(plain, *case), strict=True):
        torch.testing.assert_close(got, expected, **tolerance["fp32"])


@PATHS
def test_token_cross_entropy_of_half_precision_is_near_and_single_precision(vocabulary, width, tolerance):
    case = inputs(50, vocabulary, width, torch.bfloat16)
    got, expected = with_gradients(token_cross_entropy, *case), with_gradients(plain, *case)
    assert got[0].dtype == torch.float32
    torch.testing.assert_close(got[0], expected[0], **tolerance["bf16"])
    for a, b in zip(got[1:], expected[1:], strict=True):
        assert (a.float() - b.float()).norm() <= tolerance["bf16"]["rtol"] * b.float().norm()


@PATHS
def test_no_supervised_token_is_no_loss_and_a_zero_gradient(vocabulary, width):
    hidden, weight, labels = inputs(0, vocabulary, width)
    losses = token_cross_entropy(hidden, weight, labels)
    assert losses.shape == (0,)
    losses.sum().backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_a_uniform_guess_costs_the_logarithm_of_the_vocabulary():
    loss = token_cross_entropy(torch.zeros(1, 16), torch.randn(300, 16), torch.tensor([7]))
    assert loss.item() == pytest.approx(torch.tensor(300.0).log().item())


def test_without_counts_the_losses_are_means_over_the_batch():
    losses = combine(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0.5, 1.5]), 5.0, None)
    assert (losses.text.item(), losses.diffusion.item(), losses.total.item()) == (3.0, 1.0, 8.0)
    assert losses.counts == Counts(tokens=3, images=2)


def test_given_counts_divide_the_sums_and_the_own_counts_are_reported():
    losses = combine(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0.5, 1.5]), 2.0, Counts(tokens=90, images=8))
    assert losses.text.item() == pytest.approx(0.1)
    assert losses.diffusion.item() == 0.25
    assert losses.total.item() == pytest.approx(0.6)
    assert losses.counts == Counts(tokens=3, images=2)


def test_parts_of_a_batch_add_up_to_it():
    tokens, images, counts = torch.rand(9), torch.rand(4), Counts(9, 4)
    parts = [combine(tokens[:2], images[:3], 5.0, counts), combine(tokens[2:], images[3:], 5.0, counts)]
    whole = combine(tokens, images, 5.0, None)
    for name in ("text", "diffusion", "total"):
        assert sum(getattr(part, name) for part in parts).item() == pytest.approx(getattr(whole, name).item())


@pytest.mark.parametrize("counts", [None, Counts(0, 0)])
def test_nothing_to_learn_from_is_a_loss_of_zero(counts):
    losses = combine(torch.zeros(0), torch.zeros(0), 5.0, counts)
    assert (losses.text.item(), losses.diffusion.item(), losses.total.item()) == (0.0, 0.0, 0.0)
