"""The Triton kernels of attention, in Triton's interpreter, against a dense reference in double precision."""

import itertools
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from attention_cases import (
    MIXED,
    NAMES,
    SPANS,
    assert_accurate,
    assert_same_bits,
    layout_of,
    qkv,
    relative_error,
    run,
    spans_around_tiles,
    upstream,
)
from hypothesis import given, settings

from transfusion_fast.kernels import attention_configs, launch, reference
from transfusion_fast.kernels.layout import TILE_HEIGHTS, AttentionLayout
from transfusion_fast.model import ops

pytestmark = [
    pytest.mark.skipif(not launch.INTERPRETED, reason="needs Triton's interpreter: TRITON_INTERPRET=1"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),  # of the poison in some tests
]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HEAD_DIMS = [32, 48, 64, 96, 128, 256]
NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module", autouse=True)
def nan_in_new_memory():
    """Whatever a kernel leaves out of a new tensor is NaN: torch.empty, empty_like and new_empty alike."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all() and torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def triton(q, k, v, layout, scale=None):
    return ops.hybrid_attention(q, k, v, layout, scale=scale, backend="triton")


@pytest.mark.parametrize("spans", SPANS.values(), ids=SPANS)
def test_output_and_gradients_are_the_references(spans):
    layout = layout_of(spans)
    inputs = qkv(layout)
    assert_accurate(run(triton, inputs, layout), inputs, layout)


@given(spans_around_tiles())
@settings(max_examples=12)
def test_output_and_gradients_of_any_layout_are_the_references(spans):
    layout = layout_of(spans)
    inputs = qkv(layout, heads=(1, 1))
    assert_accurate(run(triton, inputs, layout), inputs, layout)


@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_head_dimension_and_precision_keeps_the_error_rule(dtype, dim):
    layout = layout_of(MIXED)
    inputs = qkv(layout, heads=(1, 1), dim=dim, dtype=dtype)
    assert_accurate(run(triton, inputs, layout), inputs, layout)


@pytest.mark.parametrize(
    ("heads", "scale"), [((1, 1), 0.5), ((3, 3), None), ((4, 2), None), ((6, 2), 0.5), ((3, 1), 1.5)], ids=str
)
def test_grouped_heads_and_scales_are_the_references(heads, scale):
    layout = AttentionLayout.from_spans([67, 20], [(1, 65), (70, 9)], 90)
    inputs = qkv(layout, heads)
    assert_accurate(run(triton, inputs, layout, scale), inputs, layout, scale)


SIZES = list(itertools.product(attention_configs.ARCHITECTURES, HEAD_DIMS, DTYPES[:2]))


def configurations(architecture, dim, dtype):
    asked = itertools.product(attention_configs.KERNELS, TILE_HEIGHTS)
    return [attention_configs.config(kernel, architecture, dim, dtype.itemsize, height) for kernel, height in asked]


def cuts():
    """Of each way to cut the kernels that some architecture takes, the first of the sizes that takes it."""
    found = {}
    for size in SIZES:
        with suppress(KeyError):  # which the test below reports
            cut = tuple(
                # Rows that are loaded by chunks have no use for descriptors.
                replace(c, warps=0, stages=0, descriptors=c.descriptors and c.chunk is None)
                for c in configurations(*size)
            )
            found.setdefault((size[2], cut), size)
    return list(found.values())


def test_every_architecture_has_configurations_whose_blocks_and_steps_divide_the_tiles():
    for size in SIZES:
        for c, height in zip(configurations(*size), itertools.cycle(TILE_HEIGHTS), strict=False):
            assert height % c.block == 0 and c.step % c.edge_step == 0, (size, c)


@pytest.fixture
def interpret_as(monkeypatch):
    """Runs the kernels as an architecture has them."""

    def choose(architecture):
        monkeypatch.setattr(launch, "INTERPRETED_ARCHITECTURE", architecture)
        launch.architecture.cache_clear()

    yield choose
    monkeypatch.undo()
    launch.architecture.cache_clear()


@pytest.mark.parametrize(("architecture", "dim", "dtype"), cuts(), ids=str)
def test_every_cut_of_every_architecture_keeps_the_error_rule(architecture, dim, dtype, interpret_as):
    interpret_as(architecture)
    # An image of more than any step; two documents of an image each in one tile; a short one with text.
    spans = [(0, 133), (150, 9), (200, 32), (232, 32), (270, 9)]
    layout = AttentionLayout.from_spans([200, 32, 32, 20], spans, 288)
    inputs = qkv(layout, heads=(1, 1), dim=dim, dtype=dtype)
    assert_accurate(run(triton, inputs, layout), inputs, layout)


def test_a_token_alone_is_its_value(tolerance):
    layout = AttentionLayout.from_spans([1, 1, 1], [(1, 1)])
    q, k, v = qkv(layout, heads=(1, 1))
    expected = {"out": v, "dv": upstream(v), "dq": torch.zeros_like(q), "dk": torch.zeros_like(k)}
    for name, got in run(triton, (q, k, v), layout).items():
        torch.testing.assert_close(got, expected[name], **tolerance["fp32"])


def test_a_score_far_below_zero_still_weighs_its_value():
    layout = AttentionLayout.from_spans([1], [])
    q, v = torch.full((1, 1, 16), 1e16), torch.ones(1, 1, 16)
    assert torch.equal(triton(q, -q, v, layout), v)


def test_scores_far_from_zero_neither_overflow_nor_vanish():
    """Scores of some hundreds: an fp32 of that size is known to 1e-5 or so, and with it its exponential."""
    layout = layout_of(MIXED)
    q, k, v = qkv(layout)
    inputs = [30 * q, k, v]
    expected = run(reference.hybrid_attention, [x.double() for x in inputs], layout, do=upstream(q).double())
    for name, got in run(triton, inputs, layout).items():
        assert relative_error(got, expected[name]) < 1e-4, name


def fused(layout, dtype=torch.float32):
    """q, k, v as slices of one projection [T, (H + 2G) D]."""
    q, k, v = qkv(layout, dtype=dtype)
    projection = torch.cat([x.flatten(1) for x in (q, k, v)], dim=1)
    parts = projection.split([x[0].numel() for x in (q, k, v)], dim=1)
    return [part.view(x.shape) for part, x in zip(parts, (q, k, v), strict=True)]


def heads_first(layout, dtype=torch.float32):
    """[T, H, D] views of [H, T, D] storage."""
    return [x.transpose(0, 1).contiguous().transpose(0, 1) for x in qkv(layout, dtype=dtype)]


def dims_first(layout, dtype=torch.float32):
    """[T, H, D] views whose last dimension is not the dense one."""
    return [x.permute(2, 0, 1).contiguous().permute(1, 2, 0) for x in qkv(layout, dtype=dtype)]


def misaligned(layout, dtype=torch.float32):
    """One number behind an address that wide loads could take."""
    return [torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) for x in qkv(layout, dtype=dtype)]


def odd_rows(layout, dtype=torch.float32):
    """Rows of a length that wide loads cannot take, 2D + 1 numbers."""
    wide = [torch.cat([x.flatten(1), x.new_zeros(len(x), 1)], dim=1) for x in qkv(layout, dtype=dtype)]
    return [x[:, :-1].unflatten(1, (-1, 32)) for x in wide]


@pytest.mark.parametrize("stored", [fused, heads_first, dims_first, misaligned, odd_rows])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_how_the_inputs_are_stored_changes_nothing(stored, dtype):
    layout = AttentionLayout.from_spans([80, 9], [(3, 66)], 91)
    expected = run(triton, qkv(layout, dtype=dtype), layout)
    inputs = stored(layout, dtype)
    assert any(x.data_ptr() % 16 or not x.is_contiguous() for x in inputs)
    assert_same_bits(run(triton, inputs, layout), expected)


@pytest.mark.parametrize("expand", [lambda x: x.new_ones(()).expand_as(x), lambda x: x[:, :1, :1].expand_as(x)])
def test_an_expanded_upstream_gradient_is_read_as_what_it_stands_for(expand):
    """`out.sum().backward()` hands in one number with strides of zero."""
    layout = AttentionLayout.from_spans([80, 9], [(3, 66)], 91)
    inputs = qkv(layout)
    do = expand(upstream(inputs[0]))
    assert 0 in do.stride()
    assert_same_bits(run(triton, inputs, layout, do=do), run(triton, inputs, layout, do=do.contiguous()))


def test_a_gradient_that_nothing_needs_is_none():
    layout = AttentionLayout.from_spans([9], [])
    q, k, v = qkv(layout)
    triton(q, k.requires_grad_(), v, layout).sum().backward()
    assert q.grad is None and v.grad is None
    assert k.grad.isfinite().all()


def test_the_triton_backend_is_the_torch_backend(tolerance):
    layout = layout_of(SPANS["long and short documents in turn"])
    inputs = qkv(layout, dim=64)
    expected = run(lambda *args, scale: ops.hybrid_attention(*args, scale=scale, backend="torch"), inputs, layout)
    for name, got in run(triton, inputs, layout).items():
        torch.testing.assert_close(got, expected[name], **tolerance["fp32"])


def test_a_repeated_backward_is_bitwise_equal_and_writes_to_nothing_it_was_given():
    layout = layout_of(MIXED)
    leaves = [x.requires_grad_() for x in qkv(layout)]
    out = triton(*leaves, layout)
    do = upstream(out)
    given = {"q": leaves[0], "k": leaves[1], "v": leaves[2], "out": out, "do": do, "lse": out.grad_fn.saved_tensors[-1]}
    given |= {name: value for name, value in vars(layout).items() if isinstance(value, torch.Tensor)}
    before = {name: (x.detach().clone(), x._version) for name, x in given.items()}
    first = torch.autograd.grad(out, leaves, do, retain_graph=True)
    second = torch.autograd.grad(out, leaves, do)
    for name, one, other in zip(NAMES[1:], first, second, strict=True):
        assert torch.equal(one, other), name
    for name, (value, version) in before.items():
        torch.testing.assert_close(given[name], value, rtol=0, atol=0, equal_nan=True)
        assert given[name]._version == version, name


# Poison: what a position does not see may hold anything.


def poisoned(x, rows, value):
    x = x.clone()
    x[rows] = value
    return x


@pytest.mark.parametrize("poison", [NAN, INF], ids=str)
def test_whatever_padding_holds_it_yields_zeros_and_reaches_nothing(poison):
    """Behind a tile that padding follows, within one block of rows and one step of columns."""
    layout = AttentionLayout.from_spans([70, 3], [(60, 10), (71, 1)], 100)
    inputs = qkv(layout)
    do = upstream(inputs[0])
    expected = run(triton, inputs, layout, do=do)
    bad = [poisoned(x, slice(73, None), poison) for x in (*inputs, do)]
    got = run(triton, bad[:3], layout, do=bad[3])
    assert_same_bits(got, expected)
    assert all((x[73:] == 0).all() for x in got.values())


@pytest.mark.parametrize("poison", [NAN, INF, -INF], ids=str)
def test_a_later_key_of_any_value_reaches_no_earlier_row(poison):
    layout = AttentionLayout.from_spans([150, 40], [(20, 30)])
    q, k, v = qkv(layout)
    expected = triton(q, k, v, layout)
    for seen, end in ((100, 150), (20, 50), (170, 190)):  # text; an image; text in a tile of a short document
        start = int(layout.key_start[seen])
        got = triton(q, poisoned(k, slice(seen, end), poison), v, layout)
        assert torch.equal(got[start:seen], expected[start:seen])
        assert not torch.equal(got[seen:end], expected[seen:end]), "the rows that see it do change"


def test_a_huge_value_reaches_no_row_that_does_not_see_it():
    """Keys and values for the output and dQ, queries and upstream gradients for dK and dV: products with P = 0."""
    layout = AttentionLayout.from_spans([150, 9, 30], [(20, 30)])
    q, k, v = qkv(layout)
    do = upstream(q)
    expected = run(triton, (q, k, v), layout, do=do)
    later = torch.cat([torch.arange(100, 150), torch.arange(155, 189)])
    got = run(triton, (q, poisoned(k, later, 1e20), poisoned(v, later, 1e30)), layout, do=do)
    for rows in (slice(0, 100), slice(150, 155)):
        assert_same_bits({name: got[name] for name in ("out", "dq")}, expected, rows)
    earlier = torch.cat([torch.arange(20), torch.arange(150, 155)])
    got = run(triton, (poisoned(q, earlier, 1e20), k, v), layout, do=poisoned(do, earlier, 1e30))
    for rows in (slice(20, 150), slice(155, 189)):
        assert_same_bits({name: got[name] for name in ("dk", "dv")}, expected, rows)


@pytest.mark.parametrize("poison", [NAN, INF], ids=str)
@pytest.mark.parametrize("bad", [1, 2], ids=["tall tiles", "a remainder alone in a short tile"])
def test_a_document_of_nothing_but_poison_spoils_no_other(poison, bad):
    """Its neighbours lie within one block of rows and one step of columns of it."""
    layout = AttentionLayout.from_spans([5, 70, 140, 66, 9], [(3, 2), (10, 20), (75, 10), (215, 66)])
    start, end = layout.document_offsets[bad : bad + 2].tolist()
    inputs = qkv(layout, heads=(1, 1))
    do = upstream(inputs[0])
    expected = run(triton, inputs, layout, do=do)
    spoiled = [poisoned(x, slice(start, end), poison) for x in (*inputs, do)]
    got = run(triton, spoiled[:3], layout, do=spoiled[3])
    for rows in (slice(0, start), slice(end, None)):
        assert_same_bits(got, expected, rows)
    assert all(got[name][start:end].isnan().all() for name in ("out", "dk"))


# Finite differences: the reference is right by itself, and the kernel by its own output.


def test_the_gradients_of_the_reference_are_finite_differences():
    layout = AttentionLayout.from_spans([4, 2], [(1, 2)], 7)
    inputs = [x.requires_grad_() for x in qkv(layout, dim=3, dtype=torch.float64)]
    assert torch.autograd.gradcheck(lambda *qkv: reference.hybrid_attention(*qkv, layout, scale=0.7), inputs)


@pytest.mark.parametrize("moved", [0, 1, 2], ids=["q", "k", "v"])
def test_the_kernels_gradients_are_finite_differences_of_its_output(moved):
    layout = AttentionLayout.from_spans([70, 9], [(1, 66), (72, 3)], 81)
    inputs = qkv(layout, heads=(2, 1))
    weights = upstream(inputs[0])
    direction = torch.randn(inputs[moved].shape, generator=torch.Generator().manual_seed(2))

    def loss(step):
        changed = list(inputs)
        changed[moved] = inputs[moved] + step * direction
        return float((triton(*changed, layout).double() * weights).sum())

    gradient = run(triton, inputs, layout, do=weights)[NAMES[1 + moved]]
    slope = float((gradient.double() * direction).sum())
    assert (loss(0.01) - loss(-0.01)) / 0.02 == pytest.approx(slope, rel=2e-3)
