"""Attention in tiles on the torch backend: the reference's values and gradients, without its cost."""

import attention_cases
import pytest
import torch
from attention_cases import assert_accurate
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from transfusion_fast.kernels import attention_cpu, reference
from transfusion_fast.kernels.layout import AttentionLayout
from transfusion_fast.model import ops

HEADS = [(1, 1), (3, 3), (4, 2), (4, 1), (6, 3)]  # H and G: one head, H = G, grouped, one key/value head, grouped


@st.composite
def layouts(draw, longest=5, documents=5):
    """Segments that are images or text, end to end in documents, then padding."""
    segment = st.tuples(st.booleans(), st.integers(1, longest))
    documents = draw(st.lists(st.lists(segment, min_size=1, max_size=5), min_size=1, max_size=documents))
    spans, end = [], 0
    for is_image, length in (segment for document in documents for segment in document):
        if is_image:
            spans.append((end, length))
        end += length
    lengths = [sum(length for _, length in document) for document in documents]
    return AttentionLayout.from_spans(lengths, spans, end + draw(st.integers(0, 4)))


def qkv(layout, heads=(4, 2), dim=8, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    counts = (heads[0], heads[1], heads[1])
    return [torch.randn(layout.total_length, n, dim, generator=generator, dtype=dtype) for n in counts]


def run(attention, inputs, layout, scale=None):
    """Output and gradients, for an upstream gradient that differs at every value."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = attention(*leaves, layout, scale=scale)
    upstream = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def tiled(q, k, v, layout, scale=None):
    return ops.hybrid_attention(q, k, v, layout, scale=scale, backend="torch")


def assert_like_reference(layout, heads, scale, tolerance):
    inputs = qkv(layout, heads)
    expected = run(reference.hybrid_attention, inputs, layout, scale)
    for name, got, wanted in zip(("out", "dq", "dk", "dv"), run(tiled, inputs, layout, scale), expected, strict=True):
        torch.testing.assert_close(got, wanted, **tolerance["fp32"], msg=lambda text, name=name: f"{name}: {text}")


@given(layouts() | layouts(longest=40, documents=2), st.sampled_from(HEADS), st.sampled_from([None, 0.2, 1.5]))
@settings(max_examples=60)
def test_values_and_gradients_are_the_references(tolerance, layout, heads, scale):
    assert_like_reference(layout, heads, scale, tolerance)


@given(layouts(longest=20), st.sampled_from(HEADS), st.sampled_from([1, 3, 16]))
@settings(max_examples=50)
def test_documents_longer_than_a_tile_are_the_references(tolerance, layout, heads, max_rows):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_cpu, "MAX_ROWS", max_rows)
        assert_like_reference(layout, heads, None, tolerance)


def test_a_document_of_several_full_tiles_is_the_references(tolerance):
    """Longer than MAX_ROWS as it is, an image across the cut, and short documents of other tile shapes beside it."""
    rows = attention_cpu.MAX_ROWS
    layout = AttentionLayout.from_spans([3, rows + 40, 70, 5], [(rows - 20, 60), (rows + 43, 70)], rows + 125)
    assert_like_reference(layout, (2, 1), None, tolerance)


def test_double_precision_is_the_references_to_double_precision(tolerance):
    layout = AttentionLayout.from_spans([9, 17, 4], [(2, 5), (9, 17)], 33)
    inputs = qkv(layout, dtype=torch.float64)
    expected = run(reference.hybrid_attention, inputs, layout)
    for got, wanted in zip(run(tiled, inputs, layout), expected, strict=True):
        torch.testing.assert_close(got, wanted, **tolerance["fp64"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("max_rows", [attention_cpu.MAX_ROWS, 64, 48], ids=["one tile", "several", "uneven ones"])
@pytest.mark.parametrize("spans", [([9, 17, 4], [(2, 5), (9, 17)], 33), ([300, 12, 280], [(20, 200)], 600)])
def test_half_precision_obeys_the_error_rule(monkeypatch, dtype, max_rows, spans):
    """Output and gradients of short and long documents, with images and without, whose backward has its own formula."""
    monkeypatch.setattr(attention_cpu, "MAX_ROWS", max_rows)
    layout = AttentionLayout.from_spans(*spans)
    inputs = attention_cases.qkv(layout, (4, 2), dtype=dtype)
    assert_accurate(attention_cases.run(tiled, inputs, layout, 0.3), inputs, layout, 0.3)


def test_half_precision_takes_scores_that_overflow_it():
    """Log-sum-exps beyond 65,504, which fp16 cannot hold, are subtracted in parts that keep every bit."""
    layout = AttentionLayout.from_spans([5], [])
    q, k, v = qkv(layout, (1, 1), dtype=torch.float32)
    inputs = [x.half() for x in (120 * q, 120 * k, v)]
    scores = inputs[0][:, 0].float() @ inputs[1][:, 0].float().T
    assert scores.abs().max() > 70_000
    out, dq, dk, dv = run(tiled, inputs, layout, 1.0)
    expected = run(reference.hybrid_attention, [x.float() for x in inputs], layout, 1.0)
    torch.testing.assert_close(out.float(), expected[0], rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(dv.float(), expected[3], rtol=2e-3, atol=2e-3)
    assert dq.isfinite().all() and dk.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_second_derivative_is_refused(dtype):
    layout = AttentionLayout.from_spans([9, 3], [(2, 5)])
    leaves = [x.requires_grad_() for x in qkv(layout, dtype=dtype)]
    (gradient,) = torch.autograd.grad(tiled(*leaves, layout).sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        gradient.sum().backward()


def test_padding_yields_zeros_and_takes_no_gradient_whatever_it_holds():
    layout = AttentionLayout.from_spans([6, 3], [(1, 4)], 12)
    clean = qkv(layout)
    poisoned = [torch.cat([x[:9], torch.full_like(x[9:], float("nan"))]) for x in clean]
    for got, expected in zip(run(tiled, poisoned, layout), run(tiled, clean, layout), strict=True):
        assert (got[9:] == 0).all()
        assert torch.equal(got[:9], expected[:9])


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("lengths", [(7, 7, 7), (3, 20, 9)], ids=["one tile shape", "three tile shapes"])
def test_poison_in_other_documents_does_not_reach_a_document(lengths, poison):
    layout = AttentionLayout.from_spans(lengths, [(lengths[0] + 1, 2)])
    own = slice(lengths[0], lengths[0] + lengths[1])
    clean = qkv(layout)
    poisoned = [torch.full_like(x, poison) for x in clean]
    for bad, good in zip(poisoned, clean, strict=True):
        bad[own] = good[own]
    for got, expected in zip(run(tiled, poisoned, layout), run(tiled, clean, layout), strict=True):
        assert torch.equal(got[own], expected[own])


def test_poison_in_later_tiles_of_a_document_does_not_reach_earlier_tiles(monkeypatch):
    """Within a tile it may: the weight of a key that is not seen is zero, and zero times NaN is NaN."""
    monkeypatch.setattr(attention_cpu, "MAX_ROWS", 8)
    monkeypatch.setattr(attention_cpu, "SHORT", 0)
    layout = AttentionLayout.from_spans([24], [(2, 4)])
    clean = qkv(layout)
    poisoned = [torch.cat([x[:16], torch.full_like(x[16:], float("nan"))]) for x in clean]
    assert torch.equal(tiled(*poisoned, layout)[:16], tiled(*clean, layout)[:16])


class LargestOutput(TorchDispatchMode):
    """Keeps the number of values of the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        made = out if isinstance(out, (tuple, list)) else [out]
        self.numel = max([self.numel, *(x.numel() for x in made if isinstance(x, torch.Tensor))])
        return out


@pytest.mark.parametrize("length", [32, 96])
def test_memory_is_linear_in_the_number_of_documents(length):
    def largest(documents):
        layout = AttentionLayout.from_spans([length] * documents, [(d * length + 8, 16) for d in range(documents)])
        inputs = qkv(layout, heads=(2, 1), dim=16)
        with LargestOutput() as made:
            run(tiled, inputs, layout)
        assert made.numel >= inputs[0].numel(), "the output at least is seen"
        return made.numel

    assert largest(48) == 2 * largest(24)


def test_a_repeated_backward_is_bitwise_equal():
    layout = AttentionLayout.from_spans([40, 7, 7, 130], [(3, 30), (60, 64)], 190)
    inputs = qkv(layout)
    for first, second in zip(run(tiled, inputs, layout), run(tiled, inputs, layout), strict=True):
        assert torch.equal(first, second)


def test_a_layout_without_documents_gives_zeros_and_zero_gradients():
    layout = AttentionLayout.from_spans([], [], total_length=5)
    for result in run(tiled, qkv(layout), layout):
        assert torch.equal(result, torch.zeros_like(result))
