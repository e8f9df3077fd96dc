"""The kernels of the diffusion error, in Triton's interpreter, against the reference in double precision."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pointwise_cases import DTYPES, IMAGES, assert_accurate, mse_case, run

from transfusion_fast.kernels import diffusion_mse, launch

pytestmark = [
    pytest.mark.skipif(not launch.INTERPRETED, reason="needs Triton's interpreter: TRITON_INTERPRET=1"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),  # of infinity in one test
]

SMALL = ([20, 1, 9], 5)
SHARED = IMAGES["pieces that images share"]


@pytest.mark.parametrize("images", IMAGES.values(), ids=IMAGES)
@pytest.mark.parametrize("flow", [False, True], ids=["target", "noise and latents"])
def test_errors_and_gradients_are_those_of_the_reference(images, flow):
    assert_accurate(mse_case(images, flow=flow))


@pytest.mark.parametrize("name", ["no image", "pieces that images share", "wider than a tile"])
def test_coefficients_are_those_of_the_image_of_each_patch(name):
    assert_accurate(mse_case(IMAGES[name], coefficients=True))


@given(st.lists(st.integers(1, 14), max_size=8), st.sampled_from([512, 700]))
@settings(max_examples=8)
def test_images_may_start_and_end_anywhere_in_pieces_of_four_and_two_patches(lengths, C):
    assert diffusion_mse.constants("forward", C)[0]["BLOCK_P"] in (2, 4)
    assert_accurate(mse_case((lengths, C), flow=False))


def test_the_sums_of_an_image_are_added_however_many_there_are(monkeypatch):
    monkeypatch.setattr(diffusion_mse, "PIECES", 4)
    assert_accurate(mse_case(([3, 35, 1, 8], 512)))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_half_precision_keeps_the_error_rule_and_the_error_is_in_fp32(dtype):
    for images in (SMALL, SHARED):
        results = assert_accurate(mse_case(images, dtype))
        assert results["output 0"].dtype == torch.float32


def test_prediction_noise_and_latents_may_differ_in_dtype():
    case = mse_case(SMALL)
    case = case.with_tensors(prediction=case.tensors["prediction"].bfloat16(), x_0=case.tensors["x_0"].half())
    results = assert_accurate(case)
    for name, x in case.tensors.items():
        assert results[f"gradient of {name}"].dtype == x.dtype


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_squares_beyond_fp16_are_exact_where_fp32_is(dtype):
    prediction, target = torch.full((6, 4), 3e2).to(dtype), torch.full((6, 4), -5e4).to(dtype)
    difference = float(prediction[0, 0]) - float(target[0, 0])
    case = mse_case(([1, 5], 4), flow=False)
    results = run(case.kernel, {"prediction": prediction, "target": target}, [torch.ones(2)])
    torch.testing.assert_close(results["output 0"], torch.full((2,), difference**2), rtol=1e-6, atol=0)
    gradients = (2 * difference / torch.tensor([4, 20, 20, 20, 20, 20]))[:, None].expand(6, 4).to(dtype)
    torch.testing.assert_close(results["gradient of prediction"], gradients, rtol=1e-3, atol=0)


def test_an_infinite_error_is_infinite_and_its_neighbours_are_not():
    case = mse_case(SHARED, flow=False)
    expected = case.kernel(*case.tensors.values())
    case.tensors["prediction"][256] = 1e30
    errors = case.kernel(*case.tensors.values())
    assert errors[1] == float("inf")
    others = torch.arange(len(errors)) != 1
    assert torch.equal(errors[others], expected[others])
