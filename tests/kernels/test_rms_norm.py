"""The kernels of RMS norm with the gradient of the residual, in Triton's interpreter, against the reference."""

import pytest
import torch
import torch.nn.functional as F
from pointwise_cases import DTYPES, NORM_SHAPES, assert_accurate, assert_same_bits, norm_case, run, upstreams

from transfusion_fast.kernels import launch, rms_norm
from transfusion_fast.model import ops

pytestmark = pytest.mark.skipif(not launch.INTERPRETED, reason="needs Triton's interpreter: TRITON_INTERPRET=1")


@pytest.mark.parametrize("shape", NORM_SHAPES, ids=str)
def test_outputs_and_gradients_are_those_of_the_reference(shape):
    assert_accurate(norm_case(shape))


def test_backward_adds_the_sums_of_several_tiles_and_programs():
    for T, E in ((130, 96), (70, 2050)):
        sizes, _ = rms_norm.constants("backward", E, 1e-5)
        assert sizes["BLOCK_T"] < sizes["ROWS"] < T


def test_the_weight_may_be_in_fp32_for_rows_in_half_precision():
    case = norm_case((69, 37), torch.bfloat16)
    case = case.with_tensors(weight=case.tensors["weight"].float())
    results = assert_accurate(case._replace(plain=case.reference))
    assert results["gradient of weight"].dtype == torch.float32
    assert results["output 0"].dtype == torch.bfloat16


@pytest.mark.parametrize("scale", [1e-4, 0.0, 1e4], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_near_zero_or_with_squares_beyond_fp16_keep_the_error_rule(scale, dtype):
    case = norm_case((9, 64), dtype)
    case = case.with_tensors(x=case.tensors["x"] * scale)
    assert_accurate(case._replace(plain=case.reference))


def test_the_residual_is_the_input_and_without_its_gradient_backward_is_that_of_the_norm():
    case = norm_case((69, 37))
    x, weight = (x.requires_grad_() for x in case.tensors.values())
    y, residual = case.kernel(x, weight)
    assert residual.data_ptr() == x.data_ptr()
    [upstream] = upstreams([y])
    alone = torch.autograd.grad(y, (x, weight), upstream)
    zeros = run(case.kernel, case.tensors, [upstream, torch.zeros_like(x)])
    assert_same_bits(dict(zip(("gradient of x", "gradient of weight"), alone, strict=True)), zeros)
    _, residual = case.kernel(x, weight)
    assert torch.equal(torch.autograd.grad(residual, x, upstream)[0], upstream)


def test_rows_may_have_a_stride_for_each_tensor_and_weights_a_stride():
    case = norm_case((69, 37))
    expected = run(case.kernel, case.tensors, upstream := upstreams(case.tensors["x"].expand(2, -1, -1)))
    x, *moved = (F.pad(x, (0, gap))[:, :-gap] for gap, x in enumerate([case.tensors["x"], *upstream], start=1))
    weight = case.tensors["weight"].repeat_interleave(2)[::2]
    assert_same_bits(run(case.kernel, {"x": x, "weight": weight}, moved), expected)


def test_rows_beyond_the_widest_tile_are_refused():
    with pytest.raises(ValueError, match=r'1 to 8192 numbers .*got 8193; use backend="torch"'):
        ops.rms_norm(torch.zeros(1, 8193), torch.ones(8193), 1e-5, backend="triton")
