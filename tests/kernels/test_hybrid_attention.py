"""The Triton kernels of attention, in Triton's interpreter, against a dense reference in double precision."""

import itertools
from dataclasses import replace

import pytest
import torch
from attention_cases import (
    AROUND_TILES,
    COPIES,
    MIXED,
    NAMES,
    SPANS,
    and_two_tokens,
    any_spans,
    assert_accurate,
    assert_accurate_with_large_scores,
    assert_same_bits,
    layout_of,
    qkv,
    run,
    upstream,
    with_copies,
)
from hypothesis import given, settings
from op_checks import far_apart
from pointwise_cases import heads_first, misaligned, odd_rows

from transfusion_fast.kernels import attention_configs, launch, reference
from transfusion_fast.kernels.layout import AttentionLayout
from transfusion_fast.kernels.tiles import TILE_HEIGHTS
from transfusion_fast.model import ops

pytestmark = [
    pytest.mark.skipif(not launch.INTERPRETED, reason="needs Triton's interpreter: TRITON_INTERPRET=1"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),  # of the poison in some tests
]

HALF = torch.float16  # where bits are compared, because its large blocks are interpreted fastest
NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module", autouse=True)
def nan_in_new_memory():
    """Fill new tensors with NaN, so that values which a kernel does not write are noticed."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all() and torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def triton(q, k, v, layout, scale=None):
    return ops.hybrid_attention(q, k, v, layout, scale=scale, backend="triton")


@pytest.mark.parametrize("spans", SPANS.values(), ids=SPANS)
def test_output_and_gradients_are_those_of_the_reference(spans):
    layout = layout_of(spans)
    assert_accurate(triton, layout, qkv(layout, heads=(1, 1)))


@given(any_spans(AROUND_TILES, documents=2).map(and_two_tokens))
@settings(max_examples=6)
def test_output_and_gradients_of_any_layout_are_those_of_the_reference(spans):
    layout = layout_of(spans)
    assert_accurate(triton, layout, qkv(layout, heads=(1, 1)))


@pytest.mark.parametrize("spans", COPIES.values(), ids=COPIES)
def test_with_copies_output_and_gradients_are_those_of_the_reference(spans):
    layout = layout_of(spans)
    assert_accurate(triton, layout, qkv(layout, heads=(1, 1)))


@given(with_copies(any_spans(AROUND_TILES, documents=1), AROUND_TILES).map(and_two_tokens))
@settings(max_examples=5)
def test_with_any_copies_output_and_gradients_are_those_of_the_reference(spans):
    layout = layout_of(spans)
    assert_accurate(triton, layout, qkv(layout, heads=(1, 1)))


@pytest.mark.parametrize(("heads", "scale"), [((1, 1), 0.5), ((3, 3), None), ((4, 2), 0.5), ((3, 1), 1.5)], ids=str)
def test_grouped_heads_and_scales_are_those_of_the_reference(heads, scale):
    layout = AttentionLayout.from_spans([67, 9], [(1, 65), (68, 5)], 78)
    assert_accurate(triton, layout, qkv(layout, heads), scale)


def configurations(architecture, dim, dtype):
    kernels = itertools.product(attention_configs.KERNELS, TILE_HEIGHTS)
    return [attention_configs.config(kernel, architecture, dim, dtype.itemsize, height) for kernel, height in kernels]


def distinct_sizes():
    """Return one (architecture, D, dtype) for each set of block sizes, and head dimensions that are no power of two."""
    sizes = itertools.product(attention_configs.ARCHITECTURES, (32, 64, 128, 256), (torch.float32, HALF))
    found = {}
    for size in sizes:
        # Rows that are loaded in chunks have no use for descriptors.
        blocks = [
            replace(c, warps=0, stages=0, descriptors=c.descriptors and c.chunk is None) for c in configurations(*size)
        ]
        found.setdefault((size[2], *blocks), size)
    masked = [(90, 48, torch.float32), (80, 48, HALF), (90, 96, torch.bfloat16), (90, 64, torch.bfloat16)]
    return [*found.values(), *masked]


@pytest.fixture
def interpret_as(monkeypatch):
    """Run the kernels with the configurations of another architecture."""

    def choose(architecture):
        monkeypatch.setattr(launch, "INTERPRETED_ARCHITECTURE", architecture)
        launch.architecture.cache_clear()

    yield choose
    monkeypatch.undo()
    launch.architecture.cache_clear()


@pytest.mark.parametrize(
    ("architecture", "dim", "dtype"), [(90, 128, torch.float32), (90, 64, HALF), (80, 48, HALF)], ids=str
)
def test_copies_keep_the_error_rule_by_chunks_by_descriptors_and_by_pointers(architecture, dim, dtype, interpret_as):
    interpret_as(architecture)
    tall = ([300, 40], [(10, 130)], 343, [(147, 133, 140), (280, 20, 140), (310, 30, 305)])
    layout = layout_of(([76, 5], [(3, 20)], 82, [(26, 34, 23), (60, 16, 26)]) if dtype == torch.float32 else tall)
    assert_accurate(triton, layout, qkv(layout, heads=(2, 1), dim=dim, dtype=dtype))


@pytest.mark.parametrize(("architecture", "dim", "dtype"), distinct_sizes(), ids=str)
def test_every_configuration_of_every_architecture_keeps_the_error_rule(architecture, dim, dtype, interpret_as):
    interpret_as(architecture)
    # A document with an image longer than any block; two documents of an image each in one tile; one of text and image.
    image = max(max(c.block, c.step) for c in configurations(architecture, dim, dtype)) + 5
    lengths = [max(image, 64) + 3, 7, 7, 9]
    start = lengths[0]
    spans = [(0, image), (start, 7), (start + 7, 7), (start + 17, 4)]
    layout = AttentionLayout.from_spans(lengths, spans, sum(lengths) + 3)
    assert_accurate(triton, layout, qkv(layout, heads=(1, 1), dim=dim, dtype=dtype))


def test_a_token_alone_is_its_value(tolerance):
    layout = AttentionLayout.from_spans([1, 1, 1], [(1, 1)])
    q, k, v = qkv(layout, heads=(1, 1))
    expected = {"out": v, "dv": upstream(v), "dq": torch.zeros_like(q), "dk": torch.zeros_like(k)}
    for name, got in run(triton, (q, k, v), layout).items():
        torch.testing.assert_close(got, expected[name], **tolerance["fp32"])
    q, v = torch.full((3, 1, 16), 1e16), torch.ones(3, 1, 16)
    assert torch.equal(triton(q, -q, v, layout), v), "even with a score far below zero"


@pytest.mark.parametrize("largest", [100, 1e4])
@pytest.mark.parametrize("dtype", [HALF, torch.float32], ids=str)
def test_large_scores_cost_no_more_accuracy_than_their_own_rounding(dtype, largest):
    assert_accurate_with_large_scores(triton, dtype, largest)


def test_no_weight_exceeds_one_however_large_the_scores_are():
    """Rounding scores of 1e9 moves their exponents by tens: the exponential of the difference would overflow."""
    layout = AttentionLayout.from_spans([150, 40, 9], [(20, 30), (152, 7)])
    q, k, v = qkv(layout)
    for name, got in run(triton, (1e4 * q, 1e4 * k, v), layout).items():
        assert got.isfinite().all(), name
        assert got.abs().max() < 100, name


def fused(*inputs):
    """Store q, k, v as slices of one projection [T, (H + 2G) D]."""
    parts = torch.cat([x.flatten(1) for x in inputs], dim=1).split([x[0].numel() for x in inputs], dim=1)
    return [part.view(x.shape) for part, x in zip(parts, inputs, strict=True)]


def dims_first(x):
    """Store the numbers of a head far apart."""
    return x.permute(2, 0, 1).contiguous().permute(1, 2, 0)


@pytest.mark.parametrize("stored", [fused, heads_first, dims_first, misaligned, odd_rows])
@pytest.mark.parametrize("dtype", [HALF, torch.float32], ids=str)
def test_the_memory_layout_of_the_inputs_changes_nothing(stored, dtype):
    layout = AttentionLayout.from_spans([80, 9] if dtype == HALF else [33, 9], [(3, 18)], 91)
    inputs = qkv(layout, dtype=dtype)
    moved = fused(*inputs) if stored is fused else [stored(x) for x in inputs]
    assert any(x.data_ptr() % 16 or not x.is_contiguous() for x in moved)
    assert_same_bits(run(triton, moved, layout), run(triton, inputs, layout))


def test_tensors_are_copied_only_if_the_copy_engine_cannot_address_them():
    """It needs rows at multiples of 16 bytes, and no stride of zero. The interpreter reads any tensor."""
    x = torch.randn(9, 2, 32).half()
    for good in (x, x[1:], x[:, 1:], heads_first(x)):
        assert launch.addressable(good) is good
    for bad in (misaligned(x), odd_rows(x), dims_first(x), x[:1].expand(9, 2, 32)):
        copy = launch.addressable(bad)
        assert torch.equal(copy, bad)
        assert copy.is_contiguous() and copy.data_ptr() % 16 == 0 and 0 not in copy.stride()


@pytest.mark.parametrize("architecture", [80, 90], ids=["by pointers", "by descriptors"])
def test_rows_beyond_32_bits_are_addressed(architecture, interpret_as):
    """Offsets within a tile have 32 bits: the largest stride for 128 rows is just under 2^24."""
    interpret_as(architecture)
    layout = AttentionLayout.from_spans([200, 40], [(0, 200), (210, 9)])  # full blocks start at 128 and beyond
    inputs = qkv(layout, heads=(1, 1), dtype=HALF)
    moved = [far_apart(x, step=2**24 - 16) for x in inputs]
    assert layout.query_tiles.max() * moved[0].stride(0) > 2**31
    do = upstream(inputs[0])
    expected = run(triton, inputs, layout, do=do)
    assert_same_bits(run(triton, moved, layout, do=far_apart(do, step=2**24 - 16)), expected)


@pytest.mark.parametrize("expand", [lambda x: x.new_ones(()).expand_as(x), lambda x: x[:, :1, :1].expand_as(x)])
def test_an_expanded_upstream_gradient_is_read_as_such(expand):
    """`out.sum().backward()` gives a gradient of one number with strides of zero."""
    layout = AttentionLayout.from_spans([80, 9], [(3, 66)], 91)
    inputs = qkv(layout, dtype=HALF)
    do = expand(upstream(inputs[0]))
    assert 0 in do.stride()
    assert_same_bits(run(triton, inputs, layout, do=do), run(triton, inputs, layout, do=do.contiguous()))


def test_a_gradient_that_is_not_needed_is_none():
    layout = AttentionLayout.from_spans([9], [])
    q, k, v = qkv(layout)
    triton(q, k.requires_grad_(), v, layout).sum().backward()
    assert q.grad is None and v.grad is None
    assert k.grad.isfinite().all()


def test_a_repeated_backward_gives_equal_bits_and_nothing_writes_to_inputs_or_saved_tensors():
    layout = layout_of(MIXED)
    leaves = [x.requires_grad_() for x in qkv(layout, dtype=HALF)]
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


# Poison: positions that are not visible may hold anything.


def poisoned(x, rows, value):
    x = x.clone()
    x[rows] = value
    return x


@pytest.mark.parametrize("poison", [NAN, INF], ids=str)
def test_padding_yields_zeros_and_affects_nothing_whatever_it_holds(poison):
    """The padding follows a tile within one block of rows and one block of columns."""
    layout = AttentionLayout.from_spans([70, 3], [(60, 10), (71, 1)], 100)
    inputs = qkv(layout, dtype=HALF)
    do = upstream(inputs[0])
    expected = run(triton, inputs, layout, do=do)
    bad = [poisoned(x, slice(73, None), poison) for x in (*inputs, do)]
    got = run(triton, bad[:3], layout, do=bad[3])
    assert_same_bits(got, expected)
    assert all((x[73:] == 0).all() for x in got.values())


@pytest.mark.parametrize("poison", [NAN, INF, -INF], ids=str)
def test_no_value_of_a_later_key_affects_an_earlier_row(poison):
    layout = AttentionLayout.from_spans([150, 40], [(20, 30)])
    q, k, v = qkv(layout, dtype=HALF)
    expected = triton(q, k, v, layout)
    for seen, end in ((100, 150), (20, 50), (170, 190)):  # text; an image; text in a tile of a short document
        start = int(layout.key_start[seen])
        got = triton(q, poisoned(k, slice(seen, end), poison), v, layout)
        assert torch.equal(got[start:seen], expected[start:seen])
        assert not torch.equal(got[seen:end], expected[seen:end]), "the rows that see it do change"


def test_a_huge_value_affects_no_row_that_does_not_see_it():
    """Keys and values affect the output and dQ, queries and upstream gradients dK and dV: products with P = 0."""
    layout = AttentionLayout.from_spans([150, 9, 30], [(20, 30)])
    q, k, v = qkv(layout, heads=(1, 1), dtype=torch.bfloat16)
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
def test_a_document_of_nothing_but_poison_affects_no_other(poison, bad):
    """Its neighbours lie within one block of rows and one block of columns of it."""
    layout = AttentionLayout.from_spans([5, 70, 140, 66, 9], [(3, 2), (10, 20), (75, 10), (215, 66)])
    start, end = layout.document_offsets[bad : bad + 2].tolist()
    inputs = qkv(layout, heads=(1, 1), dtype=HALF)
    do = upstream(inputs[0])
    expected = run(triton, inputs, layout, do=do)
    spoiled = [poisoned(x, slice(start, end), poison) for x in (*inputs, do)]
    got = run(triton, spoiled[:3], layout, do=spoiled[3])
    for rows in (slice(0, start), slice(end, None)):
        assert_same_bits(got, expected, rows)
    assert all(got[name][start:end].isnan().all() for name in ("out", "dk"))


@pytest.mark.parametrize("poison", [NAN, INF], ids=str)
def test_what_a_copy_does_not_see_may_hold_anything(poison):
    """The rest of the context, text behind the copy's place, lies in the same blocks of keys, as do other copies."""
    layout = layout_of(([290, 70], [(3, 66)], 363, [(150, 70, 69), (220, 70, 150), (300, 60, 295)]))
    inputs = qkv(layout, heads=(1, 1), dtype=HALF)
    do = upstream(inputs[0])
    expected = run(triton, inputs, layout, do=do)
    seen = layout.dense_mask()[150]
    assert int(seen.sum()) == 69 + 70
    got = run(triton, [poisoned(x, ~seen, poison) for x in inputs], layout, do=poisoned(do, ~seen, poison))
    assert_same_bits({name: got[name] for name in ("out", "dq")}, expected, slice(150, 220))
    assert_same_bits({name: got[name] for name in ("dk", "dv")}, expected, slice(150, 220))


@pytest.mark.parametrize("poison", [NAN, INF], ids=str)
def test_a_copy_affects_no_context_and_no_key_behind_its_place(poison):
    layout = layout_of(([290, 20], [(3, 66)], 310, [(150, 70, 69), (220, 70, 69)]))
    inputs = qkv(layout, heads=(1, 1), dtype=HALF)
    do = upstream(inputs[0])
    expected = run(triton, inputs, layout, do=do)
    got = run(
        triton, [poisoned(x, slice(150, 290), poison) for x in inputs], layout, do=poisoned(do, slice(150, 290), poison)
    )
    for rows in (slice(0, 150), slice(290, 310)):
        assert_same_bits({name: got[name] for name in ("out", "dq")}, expected, rows)
    assert_same_bits({name: got[name] for name in ("dk", "dv")}, expected, slice(128, 150))


def test_the_context_of_copies_has_the_bits_that_it_has_without_them():
    """The document without its copies, which the outputs and dQ of the context cannot tell from the one with them."""
    layout = layout_of(([290, 20], [(3, 66)], 310, [(150, 70, 69), (220, 70, 150)]))
    inputs = qkv(layout, dtype=HALF)
    do = upstream(inputs[0])
    got = run(triton, inputs, layout, do=do)
    plain = AttentionLayout.from_spans([150], [(3, 66)])
    expected = run(triton, [x[:150] for x in inputs], plain, do=do[:150])
    for name in ("out", "dq"):
        assert torch.equal(got[name][:150], expected[name]), name


def test_the_gradients_of_the_reference_are_finite_differences():
    layout = AttentionLayout.from_spans([4, 2], [(1, 2)], 7)
    inputs = [x.requires_grad_() for x in qkv(layout, dim=3, dtype=torch.float64)]
    assert torch.autograd.gradcheck(lambda *qkv: reference.hybrid_attention(*qkv, layout, scale=0.7), inputs)
