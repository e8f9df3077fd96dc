"""Layouts that are hard on tiles, inputs and error rules, shared by the tests of attention."""

import os

import torch
from hypothesis import strategies as st

from transfusion_fast.kernels import reference
from transfusion_fast.kernels.layout import AttentionLayout

# Document lengths, image spans (start, length), total length. Tiles have up to 128 or up to 64 positions.
SPANS = {
    "no position": ([], [], 0),
    "padding alone": ([], [], 9),
    "shorter than a tile": ([37], [(5, 11)], 37),
    # Two tiles; all rows of the second see one key less than a number of full blocks.
    "text alone": ([254], [], 254),
    "image at the start": ([77], [(0, 20)], 77),
    "image at the end": ([77], [(60, 17)], 77),
    "image that is the document": ([131], [(0, 131)], 131),
    "adjacent images": ([90], [(3, 30), (33, 1), (34, 50)], 90),
    "images of one patch": ([70], [(0, 1), (5, 1), (6, 1), (69, 1)], 70),
    "padding behind documents": ([66, 5], [(60, 6), (66, 5)], 100),
    "image over the end of a tile": ([266], [(30, 20), (100, 140), (258, 8)], 266),
    "image before a long text": ([200], [(0, 140)], 203),
    "documents that share tiles": (
        [1, 2, 3, 1, 1, 30, 5, 17, 9, 28, 1, 13, 40, 64, 2],
        [(0, 1), (9, 20), (38, 5), (43, 7), (70, 20), (100, 1), (120, 30)],
        220,
    ),
    "long and short documents in turn": ([65, 3, 129, 64, 1, 1, 66], [(10, 40), (100, 80), (262, 1), (300, 29)], 333),
}
# Tall and short tiles with full and partial blocks, as small as possible, to vary everything else.
MIXED = ([137, 3, 40, 1], [(0, 130), (137, 2), (146, 20)], 185)

# The same, with noised copies (start, length, place) behind the context of their document.
COPIES = {
    "places at the start, within and at the end of a context": (
        [60, 9],
        [(4, 11)],
        73,
        [(30, 7, 0), (37, 11, 4), (48, 11, 15), (59, 1, 30)],
    ),
    # Full blocks in both intervals, for rows and for columns, and remainders of both.
    "copies as tall as tiles": ([460], [(10, 130)], 463, [(147, 130, 10), (277, 130, 140), (407, 53, 140)]),
    "levels of noise of one image": (
        [108, 5],
        [(3, 20), (23, 5)],
        113,
        [(28, 20, 3), *((48 + 20 * n, 20, 3) for n in range(3))],
    ),
    # Several blocks of queries see the keys of the second document, and all of them stand before any copy.
    "text behind a document with copies": ([20, 70, 1], [], 91, [(12, 8, 4)]),
    "a document that is its copy": ([5, 70, 3, 20], [], 98, [(5, 70, 5), (90, 8, 80)]),
}

NAMES = ("out", "dq", "dk", "dv")
# The interpreter truncates to bf16 instead of rounding, which errs by up to twice as much.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7 if INTERPRETED else 2.0**-8}

SMALL = st.integers(1, 5)
AROUND_TILES = st.integers(1, 20) | st.sampled_from([31, 33, 63, 64, 65, 97, 127, 129])


def layout_of(spans):
    return AttentionLayout.from_spans(*spans[:3], noised_copies=spans[3] if len(spans) > 3 else ())


@st.composite
def any_spans(draw, length=SMALL, documents=5):
    """Draw (document lengths, image spans, total length): documents of texts and images of `length`, then padding."""
    segment = st.tuples(st.booleans(), length)
    lengths, spans, end = [], [], 0
    for document in draw(st.lists(st.lists(segment, min_size=1, max_size=4), max_size=documents)):
        start = end
        for is_image, length in document:
            spans += [(end, length)] if is_image else []
            end += length
        lengths.append(end - start)
    return lengths, spans, end + draw(st.integers(0, 5))


@st.composite
def with_copies(draw, spans, length=SMALL):
    """Draw `any_spans` with a copy behind each document of some, and up to two more, each at any place it may have."""
    lengths, images, total = draw(spans)
    moved, found, copies, start, end = [], [], [], 0, 0
    for context in lengths:
        own = [(s - start + end, n) for s, n in images if start <= s < start + context]
        places = sorted(set(range(end, end + context + 1)) - {p for s, n in own for p in range(s + 1, s + n)})
        chosen = sorted(draw(st.lists(st.sampled_from(places), max_size=3)))
        found, first = found + own, end
        end, start = end + context, start + context
        for place in chosen:
            copies.append((end, draw(length), place))
            end = sum(copies[-1][:2])
        moved.append(end - first)
    return moved, found, end + total - start, copies


def and_two_tokens(spans):
    """Add a document of two tokens, so that no gradient is zero, to which no error can be relative."""
    lengths, images, total, *copies = spans
    return [*lengths, 2], images, total + 2, *copies


def qkv(layout, heads=(2, 1), dim=32, dtype=torch.float32, seed=0):
    """Draw q [T, H, D], k and v [T, G, D] for heads = (H, G)."""
    generator = torch.Generator().manual_seed(seed)
    counts = (heads[0], heads[1], heads[1])
    drawn = [torch.randn(layout.total_length, n, dim, generator=generator) for n in counts]
    return [x.to(layout.device, dtype) for x in drawn]


def plain_attention(q, k, v, layout, scale=None):
    """Compute the reference's formula in the precision of q throughout, as plain PyTorch does."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scores = torch.einsum("thd,shd->hts", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    mask = layout.dense_mask()
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    return torch.einsum("hts,shd->thd", weights.masked_fill(~mask.any(dim=-1)[:, None], 0.0), v)


def upstream(out):
    """Draw a gradient of the output that differs at every value."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(out.shape, generator=generator).to(out)


def run(attention, inputs, layout, scale=None, do=None):
    """Return the output and the gradients by name; `do` is the upstream gradient."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = attention(*leaves, layout, scale=scale)
    do = upstream(out) if do is None else do
    return dict(zip(NAMES, [out.detach(), *torch.autograd.grad(out, leaves, do)], strict=True))


def relative_error(got, expected):
    """Return the norm of the difference over the norm of the expected values; 0 if both are zero or empty."""
    difference = (got.double() - expected.double()).norm()
    return float(difference / expected.double().norm()) if difference != 0 else 0.0


def assert_accurate(attention, layout, inputs, scale=None):
    """Hold the output and all gradients to the error rule.

    Errors are relative to a dense reference in fp64. In fp32 they stay under 2e-6, those of gradients under 1e-5. In
    half precision they are at most twice the error of plain PyTorch in the same precision, plus one rounding. Padding
    is exactly zero.
    """
    results = run(attention, inputs, layout, scale)
    do = upstream(results["out"])
    exact = run(reference.hybrid_attention, [x.double() for x in inputs], layout, scale, do.double())
    plain = run(plain_attention, inputs, layout, scale)
    used = int(layout.document_offsets[-1])
    for name, got in results.items():
        assert (got.dtype, got.shape) == (inputs[0].dtype, exact[name].shape), name
        assert (got[used:] == 0).all(), f"{name} of padding must be zero"
        if got.dtype == torch.float32:
            allowed = 2e-6 if name == "out" else 1e-5
        else:
            allowed = 2 * relative_error(plain[name], exact[name]) + ROUNDING[got.dtype]
        error = relative_error(got, exact[name])
        assert error <= allowed, f"{name} is off by {error:.2e}, allowed {allowed:.2e}"


def assert_accurate_with_large_scores(attention, dtype, largest):
    """Hold the output and all gradients, with scores up to `largest`, to the error of the reference in this precision.

    A score in fp32 has an error of some 2^-24 of its size, which is the relative error of its exponential.
    """
    layout = AttentionLayout.from_spans([150, 40, 9], [(20, 30), (152, 7)])
    q, k, v = qkv(layout)  # 32^-1/2 is no power of two, so multiplying by the scale rounds
    scores = torch.einsum("thd,sgd->hts", q, k) * q.shape[-1] ** -0.5
    factor = (largest / scores.abs().max()).sqrt()
    inputs = [x.to(dtype) for x in (factor * q, factor * k, v)]
    do = upstream(inputs[0])
    exact = run(reference.hybrid_attention, [x.double() for x in inputs], layout, do=do.double())
    plain = run(reference.hybrid_attention, inputs, layout, do=do)
    for name, got in run(attention, inputs, layout, do=do).items():
        allowed = 2 * relative_error(plain[name], exact[name]) + 2 * ROUNDING.get(dtype, 1e-5) + 4 * 2**-24 * largest
        error = relative_error(got, exact[name])
        assert error <= allowed, f"{name} is off by {error:.2e}, allowed {allowed:.2e}"


def assert_same_bits(results, expected, rows=slice(None)):
    """Check that results by name equal those expected, at `rows`."""
    for name, got in results.items():
        assert torch.equal(got[rows], expected[name][rows]), name
