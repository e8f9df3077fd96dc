"""Attention on the torch backend: the values and gradients of the reference at a lower cost."""

import pytest
import torch
from attention_cases import (
    AROUND_TILES,
    COPIES,
    SMALL,
    and_two_tokens,
    any_spans,
    assert_accurate,
    assert_accurate_with_large_scores,
    assert_same_bits,
    layout_of,
    qkv,
    relative_error,
    run,
    upstream,
    with_copies,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from op_checks import assert_registered
from torch._dynamo.testing import CompileCounterWithBackend

from transfusion_fast.kernels import attention_cpu_plan, reference
from transfusion_fast.kernels.layout import AttentionLayout
from transfusion_fast.model import ops

HEADS = [(1, 1), (3, 3), (4, 2), (4, 1), (6, 3)]  # H and G: one head, H = G, grouped, one key/value head, grouped
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def tiled(q, k, v, layout, scale=None):
    return ops.hybrid_attention(q, k, v, layout, scale=scale, backend="torch")


@given(
    (any_spans(SMALL) | any_spans(AROUND_TILES, 3)).map(and_two_tokens),
    st.sampled_from(HEADS),
    st.sampled_from([None, 0.2, 1.5]),
    st.sampled_from([1, 3, 16, attention_cpu_plan.MAX_ROWS]),
)
@settings(max_examples=60)
def test_values_and_gradients_are_those_of_the_reference(spans, heads, scale, max_rows):
    layout = layout_of(spans)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_cpu_plan, "MAX_ROWS", max_rows)
        assert_accurate(tiled, layout, qkv(layout, heads, dim=8), scale)


@given(
    with_copies(any_spans(SMALL), SMALL).map(and_two_tokens),
    st.sampled_from(HEADS),
    st.sampled_from([1, 3, attention_cpu_plan.MAX_ROWS]),
)
@settings(max_examples=30)
def test_with_copies_values_and_gradients_are_those_of_the_reference(spans, heads, max_rows):
    layout = layout_of(spans)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_cpu_plan, "MAX_ROWS", max_rows)
        assert_accurate(tiled, layout, qkv(layout, heads, dim=8))


LONG_COPY = ([960, 9], [(100, 200)], 975, [(320, 600, 310), (920, 40, 315)])

# Whose gradients add up in the context.
MANY_COPIES = ([304], [], 304, [(n, 1, 4) for n in range(4, 304)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "spans", [*COPIES.values(), LONG_COPY, MANY_COPIES], ids=[*COPIES, "copies of several tiles", "many copies"]
)
def test_copies_keep_the_error_rule(spans, dtype):
    layout = layout_of(spans)
    assert_accurate(tiled, layout, qkv(layout, (4, 2), dim=8, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_a_copy_does_not_see_may_hold_anything(poison, dtype):
    """Nor may it change the gradients of the copy, which nothing else sees. Copies of one length share a batch."""
    layout = layout_of(([20, 30], [(2, 5)], 55, [(12, 4, 2), (16, 4, 8), (40, 10, 30)]))
    clean = qkv(layout, dtype=dtype)
    expected = run(tiled, clean, layout)
    for start, end in ((12, 16), (16, 20), (40, 50)):
        unseen = ~layout.dense_mask()[start]
        assert_same_bits(run(tiled, with_poison(clean, unseen, poison), layout), expected, slice(start, end))


# A long document is text alone, or has an image at its start, at its end, or across two tiles; short ones stand beside.
LONG = {
    "text alone": ([9, 300, 5], [(2, 5)], 317),
    "an image at the start": ([9, 300, 5], [(9, 40)], 317),
    "an image at the start of the first document": ([300, 290], [(0, 40)], 590),
    "an image at the end": ([300, 290], [(260, 40)], 590),
    "an image over two tiles": ([3, 552, 70], [(495, 60), (555, 70)], 630),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spans", LONG.values(), ids=LONG)
def test_long_documents_keep_the_error_rule(spans, dtype):
    layout = layout_of(spans)
    assert_accurate(tiled, layout, qkv(layout, (2, 1), dim=8, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("max_rows", [attention_cpu_plan.MAX_ROWS, 64, 48], ids=["one tile", "several", "uneven ones"])
@pytest.mark.parametrize("spans", [([9, 17, 4], [(2, 5), (9, 17)], 33), ([300, 12, 280], [(20, 200)], 600)])
def test_half_precision_with_its_own_backward_keeps_the_error_rule(monkeypatch, dtype, max_rows, spans):
    monkeypatch.setattr(attention_cpu_plan, "MAX_ROWS", max_rows)
    layout = layout_of(spans)
    assert_accurate(tiled, layout, qkv(layout, (4, 2), dtype=dtype), 0.3)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_gradients_of_keys_and_values_are_no_less_accurate_from_many_tiles_than_from_two(monkeypatch, dtype):
    errors = []
    for max_rows in (attention_cpu_plan.MAX_ROWS, 8):
        monkeypatch.setattr(attention_cpu_plan, "MAX_ROWS", max_rows)
        layout = AttentionLayout.from_spans([600], [(300, 2)])  # text alone is not cut into tiles
        inputs = qkv(layout, dtype=dtype)
        do = upstream(inputs[0])
        got = run(tiled, inputs, layout, do=do)
        exact = run(reference.hybrid_attention, [x.double() for x in inputs], layout, do=do.double())
        errors.append([relative_error(got[name], exact[name]) for name in ("dk", "dv")])
    assert all(many <= two for two, many in zip(*errors, strict=True))


def test_double_precision_has_the_accuracy_of_double_precision(tolerance):
    layout = AttentionLayout.from_spans([9, 17, 4], [(2, 5), (9, 17)], 33)
    inputs = qkv(layout, dtype=torch.float64)
    expected = run(reference.hybrid_attention, inputs, layout)
    for name, got in run(tiled, inputs, layout).items():
        torch.testing.assert_close(got, expected[name], **tolerance["fp64"])


@pytest.mark.parametrize("largest", [100, 1e4])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_large_scores_cost_no_more_accuracy_than_their_own_rounding(dtype, largest):
    assert_accurate_with_large_scores(tiled, dtype, largest)


def test_scores_beyond_half_precision_are_supported():
    """fp16 cannot hold log-sum-exps beyond 65,504: they are subtracted in parts that keep every bit."""
    layout = AttentionLayout.from_spans([5], [])
    q, k, v = qkv(layout, (1, 1), dim=8)
    inputs = [x.half() for x in (120 * q, 120 * k, v)]
    scores = inputs[0][:, 0].float() @ inputs[1][:, 0].float().T
    assert scores.abs().max() > 70_000
    got = run(tiled, inputs, layout, 1.0)
    expected = run(reference.hybrid_attention, [x.float() for x in inputs], layout, 1.0, upstream(v.half()).float())
    for name in ("out", "dv"):
        torch.testing.assert_close(got[name].float(), expected[name], rtol=2e-3, atol=2e-3)
    assert got["dq"].isfinite().all() and got["dk"].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_a_second_derivative_is_refused(dtype):
    layout = AttentionLayout.from_spans([9, 3], [(2, 5)])
    leaves = [x.requires_grad_() for x in qkv(layout, dtype=dtype)]
    (gradient,) = torch.autograd.grad(tiled(*leaves, layout).sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        gradient.sum().backward()


@pytest.mark.parametrize("heads", [(2, 2), (4, 2)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_the_memory_layout_of_the_inputs_changes_nothing(dtype, heads):
    """A tensor at a time, because a wrong read of one must not hide behind another."""
    layout = AttentionLayout.from_spans([300, 290, 9], [(310, 40)], 610)
    inputs = qkv(layout, heads, dtype=dtype)
    do = upstream(inputs[0])
    expected = run(tiled, inputs, layout, do=do)

    def dims_first(x):
        return x.permute(2, 0, 1).contiguous().permute(1, 2, 0)

    for n in range(4):
        *moved, moved_do = [dims_first(x) if i == n else x for i, x in enumerate((*inputs, do))]
        assert_same_bits(run(tiled, moved, layout, do=moved_do), expected)


def with_poison(inputs, rows, value):
    inputs = [x.clone() for x in inputs]
    for x in inputs:
        x[rows] = value
    return inputs


@pytest.mark.parametrize("lengths", [[6, 3], []])
def test_padding_yields_zeros_and_zero_gradients_whatever_it_holds(lengths):
    layout, used = AttentionLayout.from_spans(lengths, [(1, 4)] if lengths else [], 12), sum(lengths)
    clean = qkv(layout)
    expected = run(tiled, clean, layout)
    poison = float("nan") if lengths else 1e9  # without a document, an empty sum keeps the inputs in the graph
    assert_same_bits(run(tiled, with_poison(clean, slice(used, None), poison), layout), expected)
    assert all((x[used:] == 0).all() for x in expected.values())


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("lengths", [(7, 7, 7), (3, 20, 9)], ids=["one batch", "three batches"])
def test_poison_in_other_documents_does_not_reach_a_document(lengths, poison):
    layout = AttentionLayout.from_spans(lengths, [(lengths[0] + 1, 2)])
    own = slice(lengths[0], lengths[0] + lengths[1])
    clean = qkv(layout)
    others = torch.arange(sum(lengths))[[i for i in range(sum(lengths)) if not own.start <= i < own.stop]]
    assert_same_bits(run(tiled, with_poison(clean, others, poison), layout), run(tiled, clean, layout), own)


def test_poison_in_later_tiles_of_a_document_does_not_reach_earlier_tiles(monkeypatch):
    """Within a tile it may: the weight of an invisible key is zero, and zero times NaN is NaN."""
    monkeypatch.setattr(attention_cpu_plan, "MAX_ROWS", 8)
    monkeypatch.setattr(attention_cpu_plan, "SHORT", 0)
    layout = AttentionLayout.from_spans([24], [(2, 4)])
    clean = qkv(layout)
    poisoned = with_poison(clean, slice(16, None), float("nan"))
    assert torch.equal(tiled(*poisoned, layout)[:16], tiled(*clean, layout)[:16])


@pytest.mark.parametrize("length", [32, 96])
def test_memory_is_linear_in_the_number_of_documents(length):
    def largest(documents):
        layout = AttentionLayout.from_spans([length] * documents, [(d * length + 8, 16) for d in range(documents)])
        inputs = qkv(layout, dim=16)
        run(tiled, inputs, layout)  # makes the plan
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as trace:
            run(tiled, inputs, layout)
        made = max(event.nbytes() for event in trace.profiler.kineto_results.events() if event.name() == "[memory]")
        assert made >= inputs[0].nbytes, "the output at least is seen"
        return made

    assert largest(48) == pytest.approx(2 * largest(24), rel=0.01)


@given(any_spans(SMALL) | with_copies(any_spans(SMALL), SMALL))
def test_a_plan_depends_on_the_intervals_as_on_the_spans(spans):
    layout = layout_of(spans)
    intervals = layout.key_start, layout.key_end, layout.own_start, layout.own_end
    found = attention_cpu_plan.spans_of_intervals(*intervals)
    for one, other in zip(found, attention_cpu_plan.spans_of_layout(layout), strict=True):
        assert one.tolist() == other.tolist()


def test_layers_and_the_backward_pass_share_a_plan():
    layout = AttentionLayout.from_spans([9, 40], [(3, 4)])
    inputs = qkv(layout)
    attention_cpu_plan.forget_plans()
    for _ in range(3):
        run(tiled, inputs, layout)
    assert attention_cpu_plan._plan.cache_info()[:2] == (5, 1)


def test_the_ops_are_registered_with_pytorch():
    layout = layout_of(([20, 30], [(2, 5)], 55, [(12, 4, 2), (16, 4, 8), (40, 10, 30)]))
    names = assert_registered(lambda *inputs: tiled(*inputs, layout), qkv(layout, dtype=torch.bfloat16))
    assert names == ["tiled_attention", "tiled_attention_backward"]


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_compiled_in_one_graph_it_computes_the_same_for_all_layouts_of_a_length(dtype):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(tiled, fullgraph=True, dynamic=False, backend=counter)
    for spans in (([20, 30], [(2, 5)]), ([4, 46], [(10, 9)]), ([50], [])):
        layout = AttentionLayout.from_spans(*spans)
        inputs = qkv(layout, dtype=dtype)
        assert_same_bits(run(compiled, inputs, layout), run(tiled, inputs, layout))
    assert counter.frame_count == 1
