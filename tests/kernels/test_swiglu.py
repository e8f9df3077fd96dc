"""The kernels of SwiGLU, in Triton's interpreter, against the reference in double precision."""

import pytest
import torch
from pointwise_cases import (
    DTYPES,
    STORED,
    SWIGLU_SHAPES,
    assert_accurate,
    assert_nan_where_the_reference_has_it,
    assert_repeatable,
    assert_same_bits,
    assert_saved,
    assert_writes_stay_inside,
    nan_in_new_memory,
    record,
    run,
    swiglu_case,
    swiglu_ops,
    upstreams,
)
from torch._subclasses.fake_tensor import FakeTensorMode

from transfusion_fast.kernels import launch
from transfusion_fast.kernels import swiglu as kernel
from transfusion_fast.model import ops

pytestmark = [
    pytest.mark.skipif(not launch.INTERPRETED, reason="needs Triton's interpreter: TRITON_INTERPRET=1"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),  # of exponentials that overflow
]

FUSED = pytest.mark.parametrize("fused", [False, True], ids=["two tensors", "one projection"])
SWIGLU = swiglu_ops()
SHAPE = (3, 5, 37)


@pytest.mark.parametrize("shape", SWIGLU_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs_and_gradients_of_two_tensors_are_the_references(shape, dtype):
    results = assert_accurate(SWIGLU, swiglu_case(shape, dtype))
    assert {x.dtype for x in results.values()} == {dtype}


@pytest.mark.parametrize("shape", SWIGLU_SHAPES[:-1], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs_and_gradients_of_one_projection_are_the_references(shape, dtype):
    assert_accurate(SWIGLU, swiglu_case(shape, dtype, fused=True))


LARGEST = {torch.float16: 80.0, torch.bfloat16: 1e4, torch.float32: 1e4}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_far_from_zero_silu_is_the_identity_or_zero_and_its_slope_one_or_zero(dtype):
    far = LARGEST[dtype]
    gate, up = torch.tensor([far, -far]).to(dtype), torch.tensor([3.0, 3.0]).to(dtype)
    results = run(SWIGLU[0], {"gate": gate, "up": up}, [torch.ones(2, dtype=dtype)])
    assert results["output 0"].tolist() == [3 * gate[0].item(), 0]
    assert results["gradient of gate"].tolist() == [3, 0]
    assert results["gradient of up"].tolist() == [gate[0].item(), 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_from_one_end_of_the_exponential_to_the_other_the_error_rule_holds(dtype):
    gate = torch.cat([torch.linspace(-80, 80, 321), torch.linspace(-12, -2, 101)]).to(dtype)
    assert_accurate(SWIGLU, {"gate": gate, "up": torch.ones_like(gate)})


# Memory.


@pytest.mark.parametrize("stored", STORED)
@FUSED
def test_how_tensors_are_stored_changes_nothing(stored, fused):
    tensors = swiglu_case(SHAPE, fused=fused)
    upstream = upstreams([torch.empty(SHAPE)])
    with nan_in_new_memory():
        got = run(SWIGLU[0], {name: stored(x) for name, x in tensors.items()}, [stored(x) for x in upstream])
    assert_same_bits(got, run(SWIGLU[0], tensors, upstream))


@pytest.mark.parametrize(
    "expand",
    [lambda x: x.new_ones(()).expand_as(x), lambda x: x[:1].expand_as(x), lambda x: x[..., :1].expand_as(x)],
    ids=["one number", "first row", "first column"],
)
def test_expanded_tensors_are_read_as_what_they_stand_for(expand):
    tensors = {name: expand(x) for name, x in swiglu_case(SHAPE).items()}
    upstream = expand(upstreams([torch.empty(SHAPE)])[0])
    assert 0 in upstream.stride()
    dense = {name: x.contiguous() for name, x in tensors.items()}
    assert_same_bits(run(SWIGLU[0], tensors, [upstream]), run(SWIGLU[0], dense, [upstream.contiguous()]))


def test_the_halves_of_a_projection_are_read_where_they_lie(monkeypatch):
    """By either signature, forward and backward."""
    launches = [record(monkeypatch, kernel, f"swiglu_{name}_kernel") for name in ("forward", "backward")]
    projection = swiglu_case(SHAPE, fused=True)
    gate, up = projection["gate"].chunk(2, dim=-1)
    for tensors in (projection, {"gate": gate, "up": up}):
        for launched in launches:
            launched.addresses.clear()
        run(SWIGLU[0], tensors)
        for launched in launches:
            assert launched.addresses >= {gate.data_ptr(), up.data_ptr()}


def test_a_projections_gradient_is_written_in_one_piece_the_gradients_of_its_halves(monkeypatch):
    projection = swiglu_case(SHAPE, fused=True)
    halves = dict(zip(("gate", "up"), projection["gate"].chunk(2, dim=-1), strict=True))
    expected = run(SWIGLU[0], halves)
    launched = record(monkeypatch, kernel, "swiglu_backward_kernel")
    got = run(SWIGLU[0], projection)["gradient of gate"]
    assert torch.equal(got, torch.cat([expected["gradient of gate"], expected["gradient of up"]], dim=-1))
    assert got.data_ptr() in launched.addresses


def test_outputs_are_tensors_of_their_own():
    tensors = swiglu_case(SHAPE)
    before = [x.clone() for x in tensors.values()]
    SWIGLU[0](*tensors.values()).zero_()
    assert all(torch.equal(x, y) for x, y in zip(tensors.values(), before, strict=True))


@FUSED
def test_a_repeated_backward_is_bitwise_equal_and_writes_to_nothing_it_was_given(fused):
    assert_repeatable(SWIGLU[0], swiglu_case((3, 1100), fused=fused))


@pytest.mark.parametrize("shape", [(63,), (1023,), SHAPE], ids=str)
@FUSED
def test_blocks_that_are_not_whole_write_to_nothing_beside_outputs_and_gradients(shape, fused, monkeypatch):
    assert_writes_stay_inside(SWIGLU[0], swiglu_case(shape, fused=fused), monkeypatch)


@FUSED
def test_the_inputs_alone_are_saved(fused):
    tensors = list(swiglu_case(SHAPE, torch.bfloat16, fused).values())
    assert_saved(SWIGLU[0], tensors, tensors)


def test_halves_of_a_projection_are_saved_as_views_of_it():
    gate, up = swiglu_case(SHAPE, fused=True)["gate"].chunk(2, dim=-1)
    assert_saved(SWIGLU[0], [gate, up], [gate, up])


# What is not a number, and what is not asked for.


@pytest.mark.parametrize("name", ["gate", "up", "upstream"])
def test_nan_comes_out_where_the_reference_has_it_and_nowhere_else(name):
    tensors = swiglu_case(SHAPE)
    upstream = upstreams([tensors["gate"]])
    (upstream[0] if name == "upstream" else tensors[name])[1, 2, 30:] = float("nan")
    assert_nan_where_the_reference_has_it(SWIGLU, tensors, upstream)


def test_a_gradient_that_nothing_needs_is_none():
    gate, up = swiglu_case(SHAPE).values()
    SWIGLU[0](gate, up.requires_grad_()).sum().backward()
    assert gate.grad is None
    assert up.grad.count_nonzero() == up.numel()


def test_a_dtype_without_a_kernel_is_refused_with_those_that_have_one():
    gate = torch.zeros(4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"gate must be fp16, bf16 or fp32 .*got torch.float64"):
        SWIGLU[0](gate, gate)


# As an op of PyTorch.


@FUSED
@pytest.mark.parametrize("stored", [torch.clone, STORED[0]], ids=["rows", "columns"])
def test_the_ops_are_registered_as_pytorch_wants_them(stored, fused):
    """Schema, autograd, fake tensors of the real shapes and strides, and tracing with dynamic shapes."""
    tensors = [stored(x) for x in swiglu_case((4, 6), fused=fused).values()]
    inputs = tensors if len(tensors) == 2 else [*tensors, None]
    torch.library.opcheck(kernel._backward, (torch.ones(4, 6), *inputs))
    for x in tensors:
        x.requires_grad_()
    torch.library.opcheck(kernel._forward, tuple(inputs))


@FUSED
def test_compiled_in_one_graph_it_computes_the_same(fused):
    compiled = torch.compile(SWIGLU[0], fullgraph=True, backend="aot_eager")
    for shape in (SHAPE, (2, 64)):
        tensors = swiglu_case(shape, fused=fused)
        assert_same_bits(run(compiled, tensors), run(SWIGLU[0], tensors))


@FUSED
def test_fake_tensors_have_the_shapes_and_strides_of_real_ones_and_run_no_kernel(fused, monkeypatch):
    tensors = {name: STORED[0](x) for name, x in swiglu_case(SHAPE, torch.bfloat16, fused).items()}
    real = run(SWIGLU[0], tensors)
    for name in ("forward", "backward"):
        monkeypatch.delattr(kernel, f"swiglu_{name}_kernel")
    with FakeTensorMode() as mode:
        leaves = [mode.from_tensor(x).requires_grad_() for x in tensors.values()]
        out = ops.swiglu(*leaves, backend="triton")
        fake = [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]
    for got, expected in zip(fake, real.values(), strict=True):
        assert (got.shape, got.dtype, got.stride()) == (expected.shape, expected.dtype, expected.stride())
