"""Facts that hold for rope, RMS norm, SwiGLU and the diffusion error alike, in Triton's interpreter."""

from functools import partial

import pytest
import torch
from op_checks import assert_registered, far_apart
from pointwise_cases import (
    CASES,
    DTYPES,
    STORED,
    assert_accurate,
    assert_nan_where_the_reference_has_it,
    assert_same_bits,
    assert_writes_stay_inside,
    heads_first,
    mse_case,
    nan_in_new_memory,
    norm_case,
    odd_rows,
    outputs_of,
    record_launches,
    rope_case,
    run,
    saved_by,
    swiglu_case,
    transposed,
    upstreams,
)

from transfusion_fast.kernels import launch

pytestmark = [
    pytest.mark.skipif(not launch.INTERPRETED, reason="needs Triton's interpreter: TRITON_INTERPRET=1"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),  # of NaN in some tests
]

EACH_CASE = pytest.mark.parametrize("make", CASES.values(), ids=CASES)


def matrices(case, change):
    """Change the tensors of a case that are no vectors."""
    return {name: change(x) if x.ndim > 1 else x for name, x in case.tensors.items()}


@EACH_CASE
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_precision_keeps_the_error_rule(make, dtype):
    results = assert_accurate(make(dtype))
    assert {x.dtype for name, x in results.items() if name.startswith("gradient")} == {dtype}


@EACH_CASE
@pytest.mark.parametrize("stored", [*STORED, heads_first, far_apart])
def test_the_memory_layout_of_inputs_and_upstream_gradients_changes_nothing(make, stored):
    case = make(torch.float16)
    upstream = upstreams(outputs_of(case.kernel, case.tensors.values()))
    tensors = matrices(case, stored)
    moved = [stored(x) if x.ndim > 1 else x for x in upstream]
    with nan_in_new_memory():
        got = run(case.kernel, tensors, moved)
    dense = {name: x.contiguous() for name, x in tensors.items()}
    assert_same_bits(got, run(case.kernel, dense, [x.contiguous() for x in moved]))


@EACH_CASE
def test_an_upstream_gradient_of_one_expanded_number_is_read_as_such(make):
    """`out.sum().backward()` gives a gradient with strides of zero."""
    case = make()
    expanded = [x.new_full((), 3.0).expand_as(x) for x in outputs_of(case.kernel, case.tensors.values())]
    assert_same_bits(
        run(case.kernel, case.tensors, expanded), run(case.kernel, case.tensors, [x.contiguous() for x in expanded])
    )


@EACH_CASE
def test_inputs_with_dense_rows_are_read_without_a_copy(make, monkeypatch):
    case = make()
    launches = record_launches(monkeypatch).values()
    # A gradient of the target would be computed from a prediction in fp32, which is a copy.
    leaves = [
        x.detach().requires_grad_(name in ("q", "k", "x", "gate", "up", "prediction"))
        for name, x in matrices(case, odd_rows).items()
    ]
    addresses = {x.data_ptr() for x in leaves if x.ndim > 1}
    outputs = outputs_of(case.kernel, leaves)
    assert set.union(*(kernel.addresses for kernel in launches)) >= addresses
    if {id(x) for x in case.saved} >= {id(x) for x in case.tensors.values()}:  # backward reads them too
        for kernel in launches:
            kernel.addresses.clear()
        torch.autograd.backward(outputs, upstreams(outputs))
        assert set.union(*(kernel.addresses for kernel in launches)) >= addresses


PARTIAL_TILES = {
    "rope, chunks": partial(rope_case, (21, 6, 2, 32)),
    "rope, heads and tokens": partial(rope_case, (63, 3, 1, 48)),
    "rotation": partial(rope_case, (63, 3, 1, 48), norm=False),
    "norm, rows and columns": partial(norm_case, (67, 100)),
    "swiglu, a partial block": partial(swiglu_case, (63,)),
    "swiglu, a block of its own": partial(swiglu_case, (1023,)),
    "swiglu, rows": partial(swiglu_case, (3, 5, 37), fused=True),
    "error, images of one patch": partial(mse_case, ([1, 1, 1], 3)),
    "error, pieces that images share": partial(mse_case, ([127, 130, 1, 40, 9, 3], 16)),
    "error, patches wider than a tile": partial(mse_case, ([3, 1, 4], 1500)),
}


@pytest.mark.parametrize("make", PARTIAL_TILES.values(), ids=PARTIAL_TILES)
def test_partial_tiles_write_to_nothing_but_outputs_and_gradients(make, monkeypatch):
    assert_writes_stay_inside(make(), monkeypatch)


@EACH_CASE
def test_only_what_backward_needs_is_saved_and_a_repeated_backward_gives_equal_bits_and_writes_to_nothing_else(make):
    case = make(torch.bfloat16)
    leaves = [x.requires_grad_() for x in case.tensors.values()]
    saved, outputs = saved_by(case.kernel, leaves)
    assert sorted(x.data_ptr() for x in saved) == sorted(x.data_ptr() for x in case.saved)
    upstream = upstreams(outputs)
    kept = [*leaves, *saved, *upstream]
    before = [(x.detach().clone(), x._version) for x in kept]
    first = torch.autograd.grad(outputs, leaves, upstream, retain_graph=True)
    second = torch.autograd.grad(outputs, leaves, upstream)
    for name, one, other in zip(case.tensors, first, second, strict=True):
        assert torch.equal(one, other), name
    for x, (value, version) in zip(kept, before, strict=True):
        assert torch.equal(x, value) and x._version == version
    results = [*outputs, *first]
    assert len({x.data_ptr() for x in results}) == len(results), "results share no memory"


@EACH_CASE
def test_nan_comes_out_where_the_reference_has_it_and_nowhere_else(make):
    case = make()
    upstream = upstreams(outputs_of(case.kernel, case.tensors.values()))
    for name, x in case.tensors.items():
        spoiled = x.clone()
        spoiled.view(-1)[-4] = float("nan")
        assert_nan_where_the_reference_has_it(case.with_tensors(**{name: spoiled}), upstream)
    for gradient in upstream:
        gradient.view(-1)[-2] = float("nan")
    assert_nan_where_the_reference_has_it(case, upstream)


@EACH_CASE
def test_a_gradient_that_is_not_needed_is_none_and_each_is_right_alone(make):
    case = make()
    expected = run(case.kernel, case.tensors)
    for needed in case.tensors:
        leaves = {name: x.detach().requires_grad_(name == needed) for name, x in case.tensors.items()}
        outputs = outputs_of(case.kernel, leaves.values())
        used = [(x, g) for x, g in zip(outputs, upstreams(outputs), strict=True) if x.requires_grad]
        torch.autograd.backward(*zip(*used, strict=True))
        assert torch.equal(leaves.pop(needed).grad, expected[f"gradient of {needed}"])
        assert all(x.grad is None for x in leaves.values())


@EACH_CASE
def test_a_dtype_without_a_kernel_is_refused_by_name(make):
    case, rule = make(), r"must be fp16, bf16 or fp32 .*got torch.float64; cast"
    with pytest.raises(ValueError, match=rf"(q|x|gate|prediction) {rule}"):
        case.kernel(*(x.double() for x in case.tensors.values()))
    for name in case.tensors.keys() & {"q_weight", "k_weight", "weight", "target", "x_0"}:
        with pytest.raises(ValueError, match=f"{name} {rule}"):
            case.kernel(*(case.tensors | {name: case.tensors[name].double()}).values())


OPS = {
    "rotation": ["rope", "rope"],
    "norm and rotation": ["rope", "rope_norm_backward"],
    "norm": ["rms_norm", "rms_norm_backward"],
    "swiglu": ["swiglu", "swiglu_backward"],
    "error": ["diffusion_mse", "diffusion_mse_backward"],
}


@pytest.mark.parametrize("stored", [torch.clone, transposed], ids=["contiguous", "transposed"])
@EACH_CASE
def test_the_ops_are_registered_as_pytorch_wants_them(make, stored):
    case = make()
    names = assert_registered(case.kernel, matrices(case, stored).values())
    assert names in OPS.values()


@EACH_CASE
def test_compiled_in_one_graph_it_computes_the_same(make):
    case = make()
    compiled = torch.compile(case.kernel, fullgraph=True, backend="aot_eager")
    assert_same_bits(run(compiled, case.tensors), run(case.kernel, case.tensors))
