"""The kernels of rotary embedding, in Triton's interpreter, against the reference in double precision."""

import pytest
import torch
from pointwise_cases import (
    DTYPES,
    ROPE_SHAPES,
    STORED,
    assert_accurate,
    assert_nan_where_the_reference_has_it,
    assert_repeatable,
    assert_same_bits,
    assert_saved,
    assert_writes_stay_inside,
    heads_first,
    nan_in_new_memory,
    record,
    rope_case,
    rope_of,
    run,
    saved_by,
    upstreams,
)
from torch._subclasses.fake_tensor import FakeTensorMode

from transfusion_fast.kernels import launch
from transfusion_fast.kernels import rope as kernel
from transfusion_fast.model import ops

pytestmark = [
    pytest.mark.skipif(not launch.INTERPRETED, reason="needs Triton's interpreter: TRITON_INTERPRET=1"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),  # of NaN in some tests
]

NORM = pytest.mark.parametrize("norm", [False, True], ids=["rotation", "norm and rotation"])
GROUPED = (21, 6, 2, 32)


@pytest.mark.parametrize("shape", ROPE_SHAPES.values(), ids=ROPE_SHAPES)
@NORM
def test_outputs_and_gradients_are_the_references(shape, norm):
    tensors, table = rope_case(shape, norm=norm)
    assert_accurate(rope_of(table), tensors)


@pytest.mark.parametrize("dim", [48, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@NORM
def test_half_precision_keeps_the_error_rule(dtype, dim, norm):
    tensors, table = rope_case((9, 4, 2, dim), dtype, norm)
    results = assert_accurate(rope_of(table), tensors)
    assert {x.dtype for x in results.values()} == {dtype}


def test_norm_weights_may_be_wider_than_the_heads():
    tensors, table = rope_case(GROUPED, torch.bfloat16)
    tensors |= {name: tensors[name].float() for name in ("q_weight", "k_weight")}
    results = assert_accurate((*rope_of(table)[:2], rope_of(table)[1]), tensors)
    assert results["gradient of q_weight"].dtype == torch.float32


POSITIONS = {
    "sequential": torch.arange(21) % 9,
    "shared": torch.arange(21) // 5,
    "axial": torch.stack([torch.arange(21) // 5, torch.arange(21) % 5], dim=1),
    "far from zero": torch.arange(21) + 100_000,
}


@pytest.mark.parametrize("positions", POSITIONS.values(), ids=POSITIONS)
@NORM
def test_any_positions_are_turned_by_through_their_table(positions, norm):
    tensors, _ = rope_case(GROUPED, norm=norm)
    assert_accurate(rope_of(ops.rotary(positions, 32)), tensors)


def test_a_table_that_is_a_view_is_read_as_what_it_stands_for():
    tensors, table = rope_case(GROUPED)
    view = type(table)(*(x.T.contiguous().T for x in table))
    assert not view.cos.is_contiguous()
    assert_same_bits(run(rope_of(view)[0], tensors), run(rope_of(table)[0], tensors))


@pytest.mark.parametrize("scale", [1e-3, 1e-6, 0.0, 1e4], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_norm_of_heads_near_zero_or_with_squares_beyond_fp16_keeps_the_error_rule(scale, dtype):
    tensors, table = rope_case(GROUPED, dtype)
    tensors |= {name: tensors[name] * scale for name in ("q", "k")}
    _, specified, _ = operations = rope_of(table)
    # PyTorch's own half precision overflows here, so that it allows nothing to be compared with: fp32 does.
    assert_accurate((*operations[:2], specified), tensors)


def test_the_gradient_turns_back_what_was_turned(tolerance):
    tensors, table = rope_case(GROUPED, norm=False)
    rope = rope_of(table)[0]
    results = run(rope, tensors, rope(*tensors.values()))
    for name, x in tensors.items():
        torch.testing.assert_close(results[f"gradient of {name}"], x, **tolerance["fp32"])


# Memory.


@pytest.mark.parametrize("stored", [*STORED, heads_first])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@NORM
def test_how_tensors_are_stored_changes_nothing(stored, dtype, norm):
    tensors, table = rope_case(GROUPED, dtype, norm)
    rope = rope_of(table)[0]
    upstream = upstreams(rope(*tensors.values()))
    moved = {name: stored(x) if x.ndim == 3 else x for name, x in tensors.items()}
    with nan_in_new_memory():
        got = run(rope, moved, [stored(x) for x in upstream])
    assert_same_bits(got, run(rope, tensors, upstream))


def fused_projection(dtype=torch.float32):
    """q and k as they lie in one projection [T, (H + 2G) D], and what else rope takes."""
    T, H, G, D = GROUPED
    tensors, table = rope_case(GROUPED, dtype)
    projection = torch.cat([tensors["q"], tensors["k"], torch.full((T, G, D), float("nan"), dtype=dtype)], dim=1)
    q, k, _ = projection.flatten(1).view(T, H + 2 * G, D).split([H, G, G], dim=1)
    return tensors, tensors | {"q": q, "k": k}, table


def test_q_and_k_of_one_projection_are_read_where_they_lie(monkeypatch):
    launches = [record(monkeypatch, kernel, f"rope_{name}_kernel") for name in ("forward", "backward")]
    tensors, views, table = fused_projection()
    rope = rope_of(table)[0]
    upstream = upstreams(rope(*tensors.values()))
    expected = run(rope, tensors, upstream)
    for launched in launches:
        launched.addresses.clear()
    assert_same_bits(run(rope, views, upstream), expected)
    for launched in launches:
        assert launched.addresses >= {views["q"].data_ptr(), views["k"].data_ptr()}


def test_q_and_k_are_turned_in_one_launch(monkeypatch):
    grids = []

    class Counted:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **options: None

    monkeypatch.setattr(kernel, "rope_forward_kernel", Counted())
    tensors, table = rope_case(GROUPED)
    rope_of(table)[0](*tensors.values())
    assert len(grids) == 1


@pytest.mark.parametrize("expand", [lambda x: x.new_ones(()).expand_as(x), lambda x: x[:1].expand_as(x)])
@NORM
def test_an_expanded_upstream_gradient_is_read_as_what_it_stands_for(expand, norm):
    tensors, table = rope_case(GROUPED, norm=norm)
    rope = rope_of(table)[0]
    upstream = [expand(x) for x in upstreams(rope(*tensors.values()))]
    assert all(0 in x.stride() for x in upstream)
    assert_same_bits(run(rope, tensors, upstream), run(rope, tensors, [x.contiguous() for x in upstream]))


@NORM
def test_outputs_are_tensors_of_their_own(norm):
    """Even at position 0, where nothing is turned."""
    tensors, _ = rope_case(GROUPED, norm=norm)
    before = [x.clone() for x in tensors.values()]
    for out in rope_of(ops.rotary(torch.zeros(21, dtype=torch.long), 32))[0](*tensors.values()):
        out.zero_()
    assert all(torch.equal(x, y) for x, y in zip(tensors.values(), before, strict=True))


@NORM
def test_a_repeated_backward_is_bitwise_equal_and_writes_to_nothing_it_was_given(norm):
    T, H, G, D = shape = ROPE_SHAPES["more tokens than a program of backward walks"]
    sizes, _ = kernel.constants("backward", H, G, D)
    assert sizes["BLOCK_T"] * sizes["TILES"] < T
    tensors, table = rope_case(shape, norm=norm)
    assert_repeatable(rope_of(table)[0], tensors)


@pytest.mark.parametrize("shape", [GROUPED, (63, 3, 1, 48)], ids=["chunks", "heads and tokens"])
@NORM
def test_tiles_that_are_not_whole_write_to_nothing_beside_outputs_and_gradients(shape, norm, monkeypatch):
    tensors, table = rope_case(shape, norm=norm)
    assert_writes_stay_inside(rope_of(table)[0], tensors, monkeypatch)


def test_the_rotation_saves_the_table_alone_and_the_norm_its_inputs_too():
    for norm in (False, True):
        tensors, table = rope_case(GROUPED, norm=norm)
        assert_saved(rope_of(table)[0], list(tensors.values()), [*table, *(tensors.values() if norm else ())])


def test_all_layers_save_one_table():
    tensors, table = rope_case(GROUPED, norm=False)
    leaves = [x.requires_grad_() for x in tensors.values()]
    rope = rope_of(table)[0]
    saved, _ = saved_by(lambda q, k: rope(*rope(*rope(q, k))), leaves)
    assert {x.data_ptr() for x in saved} == {x.data_ptr() for x in table}


# What is not a number, and what is not asked for.


@pytest.mark.parametrize(
    ("name", "norm"),
    [*((name, True) for name in ("q", "k", "q_weight", "k_weight", "upstream")), ("q", False), ("upstream", False)],
)
def test_nan_comes_out_where_the_reference_has_it_and_nowhere_else(name, norm):
    tensors, table = rope_case(GROUPED, norm=norm)
    upstream = upstreams([tensors["q"], tensors["k"]])
    if name == "upstream":
        upstream[0][3, 5, 17] = upstream[1][20, 1, 2] = float("nan")
    else:
        tensors[name].view(-1)[-3] = float("nan")
    assert_nan_where_the_reference_has_it(rope_of(table), tensors, upstream)


@NORM
def test_a_gradient_that_nothing_needs_is_none_and_one_output_alone_is_differentiated(norm):
    tensors, table = rope_case(GROUPED, norm=norm)
    upstream = upstreams([tensors["q"], tensors["k"]])
    expected = run(rope_of(table)[0], tensors, [upstream[0], torch.zeros_like(upstream[1])])
    for name in ("q", "q_weight")[: len(tensors) // 2]:
        tensors[name].requires_grad_()
    rope_of(table)[0](*tensors.values())[0].backward(upstream[0])
    for name, x in tensors.items():
        if name in ("q", "q_weight"):
            assert torch.equal(x.grad, expected[f"gradient of {name}"])
        else:
            assert x.grad is None


def test_a_dtype_without_a_kernel_is_refused_with_those_that_have_one():
    tensors, table = rope_case(GROUPED)
    for names in (("q", "k"), ("q_weight",), ("k_weight",)):
        wide = tensors | {name: tensors[name].double() for name in names}
        with pytest.raises(ValueError, match=rf"{names[0]} must be fp16, bf16 or fp32 .*got torch.float64"):
            rope_of(table)[0](*wide.values())


# As an op of PyTorch.


@pytest.mark.parametrize("stored", [torch.clone, heads_first], ids=["tokens first", "heads first"])
def test_the_ops_are_registered_as_pytorch_wants_them(stored):
    """Schema, autograd, fake tensors of the real shapes and strides, and tracing with dynamic shapes."""
    tensors, table = rope_case((5, 2, 1, 16))
    q, k, *weights = [stored(x).requires_grad_() if x.ndim == 3 else x.requires_grad_() for x in tensors.values()]
    torch.library.opcheck(kernel._turn, (q, k, *table, False))
    torch.library.opcheck(kernel._norm_and_turn, (q, k, *table, *weights))
    inputs = [x.detach() for x in (q, k, *table, *weights)]
    torch.library.opcheck(kernel._norm_backward, (torch.ones_like(inputs[0]), torch.ones_like(inputs[1]), *inputs))


@NORM
def test_compiled_in_one_graph_it_computes_the_same(norm):
    positions = torch.arange(21)

    def rope(q, k, *weights):
        options = dict(zip(("q_weight", "k_weight"), weights, strict=False))
        return ops.rope(q, k, positions, **options, backend="triton")

    tensors, _ = rope_case(GROUPED, norm=norm)
    compiled = torch.compile(rope, fullgraph=True, backend="aot_eager")
    assert_same_bits(run(compiled, tensors), run(rope, tensors))


@NORM
def test_fake_tensors_have_the_shapes_and_strides_of_real_ones_and_run_no_kernel(norm, monkeypatch):
    tensors, table = rope_case(GROUPED, torch.bfloat16, norm)
    tensors |= {name: heads_first(tensors[name]) for name in ("q", "k")}
    real = run(rope_of(table)[0], tensors)
    for name in ("forward", "backward"):
        monkeypatch.delattr(kernel, f"rope_{name}_kernel")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        leaves = [mode.from_tensor(x).requires_grad_() for x in tensors.values()]
        outputs = rope_of(type(table)(*(mode.from_tensor(x) for x in table)))[0](*leaves)
        fake = [*outputs, *torch.autograd.grad(outputs, leaves, [torch.ones_like(x) for x in outputs])]
    for got, expected in zip(fake, real.values(), strict=True):
        assert (got.shape, got.dtype, got.stride()) == (expected.shape, expected.dtype, expected.stride())
