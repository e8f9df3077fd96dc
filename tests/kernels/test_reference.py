"""The specification of every op, against values worked out by hand or in plain loops."""

import math

import pytest
import torch
import torch.nn.functional as F

from transfusion_fast.kernels import reference
from transfusion_fast.kernels.layout import AttentionLayout


def offsets(*values):
    return torch.tensor(values, dtype=torch.int32)


def test_attention_with_equal_scores_is_the_mean_of_the_visible_values():
    layout = AttentionLayout.from_spans([4, 2], [(1, 2)], total_length=7)
    v = torch.tensor([1.0, 2.0, 6.0, 7.0, 10.0, 20.0, 99.0]).view(7, 1, 1)
    out = reference.hybrid_attention(torch.zeros(7, 1, 1), torch.randn(7, 1, 1), v, layout)
    assert out.flatten().tolist() == pytest.approx([1.0, 3.0, 3.0, 4.0, 10.0, 15.0, 0.0])


@pytest.mark.parametrize("scale", [0.7, None])
def test_attention_is_the_softmax_of_products_scaled_by_default_by_the_root_of_the_dimension(tolerance, scale):
    torch.manual_seed(0)
    layout = AttentionLayout.from_spans([5, 3], [(2, 2)])
    q, k, v = (torch.randn(8, heads, 4, dtype=torch.float64) for heads in (4, 2, 2))
    expected = torch.zeros_like(q)
    for i in range(8):
        keys = range(layout.key_start[i], layout.key_end[i])
        for h in range(4):
            weights = [math.exp((scale or 0.5) * float(q[i, h] @ k[j, h // 2])) for j in keys]
            expected[i, h] = sum(w * v[j, h // 2] for w, j in zip(weights, keys, strict=True)) / sum(weights)
    got = reference.hybrid_attention(q, k, v, layout, scale=scale)
    torch.testing.assert_close(got, expected, **tolerance["fp64"])


def test_attention_of_padding_has_no_gradient():
    layout = AttentionLayout.from_spans([2], [], total_length=4)
    leaves = [torch.randn(4, 1, 4, requires_grad=True) for _ in "qkv"]
    reference.hybrid_attention(*leaves, layout).sum().backward()
    for leaf in leaves:
        assert leaf.grad.isfinite().all()
        assert (leaf.grad[2:] == 0).all()


def test_rope_pairs_the_halves_with_falling_frequencies():
    """With D = 4 and theta = 100 the pairs are (0, 2) at frequency 1 and (1, 3) at frequency 1/10."""
    q = torch.tensor([1.0, 1.0, 0.5, -2.0]).view(1, 1, 4)
    rotated, _ = reference.rope(q, q, torch.tensor([3]), theta=100.0)
    first = [math.cos(3) - 0.5 * math.sin(3), math.cos(0.3) + 2 * math.sin(0.3)]
    second = [math.sin(3) + 0.5 * math.cos(3), math.sin(0.3) - 2 * math.cos(0.3)]
    assert rotated.flatten().tolist() == pytest.approx([*first, *second])


def test_axial_rope_of_equal_coordinates_is_the_one_dimensional_rotation():
    torch.manual_seed(0)
    q, k = torch.randn(6, 4, 16), torch.randn(6, 2, 16)
    line = torch.tensor([0, 3, 3, 8, 100, 4000])
    for flat, plane in zip(reference.rope(q, k, line), reference.rope(q, k, line[:, None].expand(6, 2)), strict=True):
        assert torch.equal(flat, plane)


def test_axial_rope_rotates_even_pairs_by_the_row_and_odd_pairs_by_the_column():
    """With D = 8 and theta = 16 the frequencies are 1, 1/2, 1/4 and 1/8; the row is 3, the column 7."""
    q = torch.tensor([1.0] * 4 + [0.0] * 4).view(1, 1, 8)
    rotated, _ = reference.rope(q, q, torch.tensor([[3, 7]]), theta=16.0)
    angles = [3, 7 / 2, 3 / 4, 7 / 8]
    assert rotated.flatten().tolist() == pytest.approx([f(a) for f in (math.cos, math.sin) for a in angles])


def test_rope_normalizes_the_heads_before_it_rotates_them(tolerance):
    """The weights differ within each pair, so that norm and rotation do not commute."""
    torch.manual_seed(0)
    q, k = 5 * torch.randn(5, 4, 8), 5 * torch.randn(5, 2, 8)
    q_weight, k_weight = torch.rand(8) + 0.5, torch.rand(8) + 0.5
    positions = torch.arange(5)

    def normed(x, weight):
        return x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * weight

    got = reference.rope(q, k, positions, q_weight=q_weight, k_weight=k_weight)
    expected = reference.rope(normed(q, q_weight), normed(k, k_weight), positions)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, **tolerance["fp32"])


def test_rope_rotates_half_precision_in_single_precision():
    torch.manual_seed(0)
    q = torch.randn(3, 1, 8).bfloat16()
    positions = torch.tensor([1000, 1001, 4095])
    half, _ = reference.rope(q, q, positions)
    single, _ = reference.rope(q.float(), q.float(), positions)
    assert torch.equal(half, single.bfloat16())


def test_swiglu_of_small_numbers():
    gate, up = torch.tensor([0.0, 1.0, -1.0, 2.0]), torch.tensor([5.0, 2.0, 3.0, -1.0])
    expected = [0.0, 2 * 0.7310585786, -3 * 0.2689414214, -2 * 0.8807970780]
    assert reference.swiglu(gate, up).tolist() == pytest.approx(expected)


def test_swiglu_of_half_precision_rounds_once():
    torch.manual_seed(0)
    gate, up = torch.randn(64).bfloat16(), torch.randn(64).bfloat16()
    assert torch.equal(reference.swiglu(gate, up), (F.silu(gate.float()) * up.float()).bfloat16())


def test_diffusion_mse_of_small_images():
    """Images of one patch, two patches and one patch, of two values: sums of squares 5, 4 + 16 and 0."""
    prediction = torch.tensor([[1.0, 2.0], [2.0, 0.0], [0.0, 4.0], [3.0, 3.0]])
    target = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [3.0, 3.0]])
    assert reference.diffusion_mse(prediction, target, offsets(0, 1, 3, 4)).tolist() == [2.5, 5.0, 0.0]


def test_diffusion_mse_of_no_image_is_empty_and_has_a_gradient():
    prediction = torch.zeros(0, 4, requires_grad=True)
    errors = reference.diffusion_mse(prediction, torch.zeros(0, 4), offsets(0))
    assert errors.shape == (0,)
    errors.sum().backward()
    assert prediction.grad.shape == (0, 4)


def test_diffusion_mse_subtracts_and_sums_half_precision_in_single_precision(tolerance):
    """256 - 0.5 is no bfloat16 number, and a bfloat16 sum of 1000 squares would stop growing at 256 of them."""
    prediction, target = torch.full((1000, 1), 256.0).bfloat16(), torch.full((1000, 1), 0.5).bfloat16()
    errors = reference.diffusion_mse(prediction, target, offsets(0, 1000))
    torch.testing.assert_close(errors, torch.tensor([255.5**2]), **tolerance["fp32"])
