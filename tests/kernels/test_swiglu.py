"""The kernels of SwiGLU, in Triton's interpreter, against the reference in double precision."""

import pytest
import torch
from pointwise_cases import (
    DTYPES,
    SWIGLU_SHAPES,
    assert_accurate,
    record_launches,
    run,
    swiglu_case,
)

from transfusion_fast.kernels import launch

pytestmark = [
    pytest.mark.skipif(not launch.INTERPRETED, reason="needs Triton's interpreter: TRITON_INTERPRET=1"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),  # of exponentials that overflow
]

SHAPE = (3, 5, 37)


@pytest.mark.parametrize("shape", SWIGLU_SHAPES, ids=str)
def test_outputs_and_gradients_are_those_of_the_reference(shape):
    for dtype in DTYPES:
        assert_accurate(swiglu_case(shape, dtype))
        if shape:
            assert_accurate(swiglu_case(shape, dtype, fused=True))


@pytest.mark.parametrize(("dtype", "far"), [*zip(DTYPES, (1e4, 80.0, 1e4), strict=True)], ids=str)
def test_far_from_zero_silu_is_the_identity_or_zero_and_its_slope_one_or_zero(dtype, far):
    gate, up = torch.tensor([far, -far]).to(dtype), torch.tensor([3.0, 3.0]).to(dtype)
    results = run(swiglu_case((2,)).kernel, {"gate": gate, "up": up}, [torch.ones(2, dtype=dtype)])
    assert results["output 0"].tolist() == [3 * gate[0].item(), 0]
    assert results["gradient of gate"].tolist() == [3, 0]
    assert results["gradient of up"].tolist() == [gate[0].item(), 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_error_rule_holds_from_one_end_of_the_exponential_to_the_other(dtype):
    gate = torch.cat([torch.linspace(-80, 80, 321), torch.linspace(-12, -2, 101)]).to(dtype)
    assert_accurate(swiglu_case((422,), dtype).with_tensors(gate=gate, up=torch.ones_like(gate)))


def test_the_halves_of_a_projection_are_read_in_place_and_their_gradients_written_in_one_piece(monkeypatch):
    case = swiglu_case(SHAPE, fused=True)
    gate, up = case.tensors["gate"].chunk(2, dim=-1)
    expected = run(case.kernel, {"gate": gate, "up": up})
    launches = record_launches(monkeypatch)
    got = run(case.kernel, case.tensors)["gradient of gate"]
    for name in ("swiglu_forward_kernel", "swiglu_backward_kernel"):
        assert launches[name].addresses >= {gate.data_ptr(), up.data_ptr()}
    assert torch.equal(got, torch.cat([expected["gradient of gate"], expected["gradient of up"]], dim=-1))
    assert got.data_ptr() in launches["swiglu_backward_kernel"].addresses
