"""The kernels of rotary embedding, in Triton's interpreter, against the reference in double precision."""

import pytest
import torch
from pointwise_cases import (
    DTYPES,
    ROPE_SHAPES,
    assert_accurate,
    assert_same_bits,
    outputs_of,
    record_launches,
    rope_case,
    run,
    saved_by,
    upstreams,
)

from transfusion_fast.kernels import launch, rope

pytestmark = pytest.mark.skipif(not launch.INTERPRETED, reason="needs Triton's interpreter: TRITON_INTERPRET=1")

NORM = pytest.mark.parametrize("norm", [False, True], ids=["rotation", "norm and rotation"])
GROUPED = (21, 6, 2, 32)


@pytest.mark.parametrize("shape", ROPE_SHAPES.values(), ids=ROPE_SHAPES)
@NORM
def test_outputs_and_gradients_are_those_of_the_reference(shape, norm):
    assert_accurate(rope_case(shape, norm=norm))


def test_backward_through_the_norm_adds_the_sums_of_several_tiles_and_programs():
    T, H, G, D = ROPE_SHAPES["more tokens than a program of backward"]
    sizes, _ = rope.constants("backward", H, G, D)
    assert sizes["BLOCK_T"] < sizes["BLOCK_T"] * sizes["TILES"] < T


@pytest.mark.parametrize("dim", [48, 128])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@NORM
def test_half_precision_keeps_the_error_rule(dtype, dim, norm):
    assert_accurate(rope_case((9, 4, 2, dim), dtype, norm))


@pytest.mark.parametrize("names", [("q_weight", "k_weight"), ("q_weight",), ("k_weight",)], ids=" and ".join)
def test_norm_weights_may_be_in_fp32_for_heads_in_half_precision(names):
    case = rope_case(GROUPED, torch.bfloat16)
    case = case.with_tensors(**{name: case.tensors[name].float() for name in names})
    results = assert_accurate(case._replace(plain=case.reference))
    assert all(results[f"gradient of {name}"].dtype == torch.float32 for name in names)


POSITIONS = {
    "sequential": torch.arange(21) % 9,
    "shared": torch.arange(21) // 5,
    "axial": torch.stack([torch.arange(21) // 5, torch.arange(21) % 5], dim=1),
    "far from zero": torch.arange(21) + 100_000,
}


@pytest.mark.parametrize("positions", POSITIONS.values(), ids=POSITIONS)
@NORM
def test_any_positions_are_supported(positions, norm):
    assert_accurate(rope_case(GROUPED, norm=norm, positions=positions))


@pytest.mark.parametrize("scale", [1e-3, 1e-6, 0.0, 1e4], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_norm_of_heads_near_zero_or_with_squares_beyond_fp16_keeps_the_error_rule(scale, dtype):
    case = rope_case(GROUPED, dtype)
    case = case.with_tensors(**{name: case.tensors[name] * scale for name in ("q", "k")})
    # PyTorch's own half precision overflows here and would allow any error: compare with fp32.
    assert_accurate(case._replace(plain=case.reference))


def test_the_gradient_rotates_back(tolerance):
    case = rope_case(GROUPED, norm=False)
    results = run(case.kernel, case.tensors, outputs_of(case.kernel, case.tensors.values()))
    for name, x in case.tensors.items():
        torch.testing.assert_close(results[f"gradient of {name}"], x, **tolerance["fp32"])


def test_q_and_k_of_one_projection_are_read_in_place_and_rotated_in_one_launch(monkeypatch):
    T, H, G, D = GROUPED
    case = rope_case(GROUPED)
    q, k = case.tensors["q"], case.tensors["k"]
    projection = torch.cat([q, k, torch.full((T, G, D), float("nan"))], dim=1)
    q, k, _ = projection.flatten(1).view(T, H + 2 * G, D).split([H, G, G], dim=1)
    upstream = upstreams([q, k])
    expected = run(case.kernel, case.tensors, upstream)
    launches = record_launches(monkeypatch)
    assert_same_bits(run(case.kernel, case.tensors | {"q": q, "k": k}, upstream), expected)
    for name in ("rope_forward_kernel", "rope_backward_kernel"):
        assert launches[name].count == 1
        assert launches[name].addresses >= {q.data_ptr(), k.data_ptr()}


def test_a_table_that_is_a_view_is_read_correctly():
    positions = POSITIONS["sequential"]
    case, viewed = rope_case(GROUPED, positions=positions), rope_case(GROUPED, positions=positions)
    for table in viewed.saved[:2]:
        table.set_(table.T.contiguous().T)
        assert not table.is_contiguous()
    assert_same_bits(run(viewed.kernel, case.tensors), run(case.kernel, case.tensors))


def test_all_layers_save_the_same_table():
    case = rope_case(GROUPED, norm=False)
    leaves = [x.requires_grad_() for x in case.tensors.values()]
    saved, _ = saved_by(lambda q, k: case.kernel(*case.kernel(*case.kernel(q, k))), leaves)
    assert {x.data_ptr() for x in saved} == {x.data_ptr() for x in case.saved}
