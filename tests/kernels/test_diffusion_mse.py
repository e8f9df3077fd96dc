"""The kernels of the diffusion error, in Triton's interpreter, against the reference in double precision."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pointwise_cases import (
    DTYPES,
    IMAGES,
    STORED,
    assert_accurate,
    assert_nan_where_the_reference_has_it,
    assert_repeatable,
    assert_same_bits,
    assert_saved,
    assert_writes_stay_inside,
    mse_case,
    mse_of,
    nan_in_new_memory,
    record,
    run,
    upstreams,
)
from torch._subclasses.fake_tensor import FakeTensorMode

from transfusion_fast.kernels import diffusion_mse as kernel
from transfusion_fast.kernels import launch
from transfusion_fast.model import ops

pytestmark = [
    pytest.mark.skipif(not launch.INTERPRETED, reason="needs Triton's interpreter: TRITON_INTERPRET=1"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),  # of NaN in some tests
]

FLOW = pytest.mark.parametrize("flow", [False, True], ids=["target", "noise and latents"])
LITTLE = ([20, 1, 9], 5)
NAN = float("nan")


@pytest.mark.parametrize("images", IMAGES.values(), ids=IMAGES)
@FLOW
def test_errors_and_gradients_are_the_references(images, flow):
    tensors, offsets = mse_case(images, flow=flow)
    assert_accurate(mse_of(offsets), tensors)


@given(st.lists(st.integers(1, 14), max_size=8), st.sampled_from([512, 700]))
@settings(max_examples=15)
def test_images_that_begin_and_end_anywhere_in_pieces_of_four_and_two_patches_are_the_references(lengths, C):
    assert kernel.constants("forward", C)[0]["BLOCK_P"] in (2, 4)
    tensors, offsets = mse_case((lengths, C), flow=False)
    assert_accurate(mse_of(offsets), tensors)


def test_the_sums_of_an_image_are_added_however_many_there_are(monkeypatch):
    monkeypatch.setattr(kernel, "PIECES", 4)
    tensors, offsets = mse_case(([3, 35, 1, 8], 512))
    assert_accurate(mse_of(offsets), tensors)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("images", [LITTLE, IMAGES["pieces that images share"]], ids=["little", "pieces"])
@FLOW
def test_half_precision_keeps_the_error_rule_and_the_error_is_of_fp32(dtype, images, flow):
    tensors, offsets = mse_case(images, dtype, flow)
    results = assert_accurate(mse_of(offsets), tensors)
    assert results.pop("output 0").dtype == torch.float32
    assert {x.dtype for x in results.values()} == {dtype}


def test_prediction_noise_and_latents_may_differ_in_dtype():
    tensors, offsets = mse_case(LITTLE)
    tensors |= {"prediction": tensors["prediction"].bfloat16(), "x_0": tensors["x_0"].half()}
    results = assert_accurate(mse_of(offsets), tensors)
    for name, x in tensors.items():
        assert results[f"gradient of {name}"].dtype == x.dtype


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_squares_beyond_fp16_are_exact_where_fp32_is(dtype):
    prediction, target = torch.full((6, 4), 3e2).to(dtype), torch.full((6, 4), -5e4).to(dtype)
    offsets = torch.tensor([0, 1, 6], dtype=torch.int32)
    difference = float(prediction[0, 0]) - float(target[0, 0])
    results = run(mse_of(offsets)[0], {"prediction": prediction, "target": target}, [torch.ones(2)])
    torch.testing.assert_close(results["output 0"], torch.full((2,), difference**2), rtol=1e-6, atol=0)
    gradients = 2 * difference / torch.tensor([4, 20, 20, 20, 20, 20])
    torch.testing.assert_close(
        results["gradient of prediction"], gradients[:, None].expand(6, 4).to(dtype), rtol=1e-3, atol=0
    )


def test_the_objectives_are_the_error_against_their_targets():
    tensors, offsets = mse_case(LITTLE)
    prediction, eps, x_0 = tensors.values()
    for objective, target in (("ddpm", eps), ("flow", eps - x_0)):
        got = ops.diffusion_mse_from_noise(prediction, x_0, eps, offsets, objective, backend="triton")
        assert torch.equal(got, ops.diffusion_mse(prediction, target, offsets, backend="triton"))


# Memory.


def one_row(x):
    """The first row in place of all, stored once."""
    return x[:1].expand_as(x)


@pytest.mark.parametrize("stored", [*STORED, one_row])
@FLOW
def test_how_tensors_are_stored_changes_nothing(stored, flow):
    tensors, offsets = mse_case(IMAGES["pieces that images share"], flow=flow)
    tensors = {name: stored(x) for name, x in tensors.items()}
    error = mse_of(offsets)[0]
    with nan_in_new_memory():
        got = run(error, tensors)
    assert_same_bits(got, run(error, {name: x.contiguous() for name, x in tensors.items()}))


def test_an_expanded_upstream_gradient_is_read_as_what_it_stands_for():
    """`errors.sum().backward()` hands in one number with a stride of zero."""
    tensors, offsets = mse_case(LITTLE)
    error = mse_of(offsets)[0]
    upstream = torch.tensor(3.0).expand(3)
    assert_same_bits(run(error, tensors, [upstream]), run(error, tensors, [upstream.contiguous()]))


def test_rows_of_any_stride_are_read_where_they_lie(monkeypatch):
    launches = [record(monkeypatch, kernel, f"diffusion_mse_{name}_kernel") for name in ("forward", "backward")]
    tensors, offsets = mse_case(LITTLE)
    leaves = [torch.cat([x, x], dim=1)[:, :5] for x in tensors.values()]
    leaves[0].requires_grad_()
    mse_of(offsets)[0](*leaves).sum().backward()
    for launched in launches:
        assert launched.addresses >= {x.data_ptr() for x in leaves}


@FLOW
def test_a_repeated_backward_is_bitwise_equal_and_writes_to_nothing_it_was_given(flow):
    tensors, offsets = mse_case(IMAGES["pieces that images share"], flow=flow)
    assert_repeatable(mse_of(offsets)[0], tensors)


@pytest.mark.parametrize("name", ["images of one patch", "pieces that images share", "wider than a tile"])
def test_pieces_that_are_not_whole_write_to_nothing_beside_errors_and_gradients(name, monkeypatch):
    tensors, offsets = mse_case(IMAGES[name])
    assert_writes_stay_inside(mse_of(offsets)[0], tensors, monkeypatch)


@FLOW
def test_the_inputs_alone_are_saved(flow):
    tensors, offsets = mse_case(LITTLE, torch.bfloat16, flow)
    assert_saved(mse_of(offsets)[0], list(tensors.values()), [*tensors.values(), offsets])


def test_gradients_share_no_memory():
    tensors, offsets = mse_case(LITTLE)
    results = run(mse_of(offsets)[0], tensors)
    assert len({x.data_ptr() for x in results.values()}) == 4


# What is not a number, and what is not asked for.


@pytest.mark.parametrize("name", ["prediction", "target", "x_0", "upstream"])
def test_nan_comes_out_where_the_reference_has_it_and_nowhere_else(name):
    """One value of the second image, near its end within a block of patches; or that image's upstream gradient."""
    tensors, offsets = mse_case(IMAGES["pieces that images share"])
    upstream = upstreams([torch.empty(len(offsets) - 1)])
    if name == "upstream":
        upstream[0][1] = NAN
    else:
        tensors[name][256, 3] = NAN
    assert_nan_where_the_reference_has_it(mse_of(offsets), tensors, upstream)


def test_an_infinite_error_is_infinite_and_its_neighbours_are_not():
    tensors, offsets = mse_case(IMAGES["pieces that images share"], flow=False)
    expected = mse_of(offsets)[0](*tensors.values())
    tensors["prediction"][256] = 1e30
    errors = mse_of(offsets)[0](*tensors.values())
    assert errors[1] == float("inf")
    others = torch.arange(len(errors)) != 1
    assert torch.equal(errors[others], expected[others])


@pytest.mark.parametrize("needed", [0, 1, 2], ids=["prediction", "target", "x_0"])
def test_a_gradient_that_nothing_needs_is_none(needed):
    tensors, offsets = mse_case(LITTLE)
    expected = run(mse_of(offsets)[0], tensors, [torch.ones(3)])
    leaves = list(tensors.values())
    leaves[needed].requires_grad_()
    mse_of(offsets)[0](*leaves).sum().backward()
    for i, (name, leaf) in enumerate(zip(tensors, leaves, strict=True)):
        if i == needed:
            assert torch.equal(leaf.grad, expected[f"gradient of {name}"])
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("name", ["prediction", "target", "x_0"])
def test_a_dtype_without_a_kernel_is_refused_with_those_that_have_one(name):
    tensors, offsets = mse_case(LITTLE)
    tensors[name] = tensors[name].double()
    with pytest.raises(ValueError, match=rf"{name} must be fp16, bf16 or fp32 .*got torch.float64"):
        kernel.diffusion_mse(tensors["prediction"], tensors["target"], offsets, tensors["x_0"])


# As an op of PyTorch.


@FLOW
@pytest.mark.parametrize("stored", [torch.clone, STORED[0]], ids=["rows", "columns"])
def test_the_ops_are_registered_as_pytorch_wants_them(stored, flow):
    """Schema, autograd, fake tensors of the real shapes and strides, and tracing with dynamic shapes."""
    tensors, offsets = mse_case(LITTLE, flow=flow)
    prediction, target, x_0 = ([stored(x) for x in tensors.values()] + [None])[:3]
    torch.library.opcheck(kernel._backward, (torch.ones(3), prediction, target, offsets, x_0))
    for x in (prediction, target):
        x.requires_grad_()
    torch.library.opcheck(kernel._forward, (prediction, target, offsets, x_0))


def test_compiled_in_one_graph_it_computes_the_same():
    """From a target, and from noise by either objective; two lists of images."""
    for images in (LITTLE, ([3, 4], 5)):
        tensors, offsets = mse_case(images)

        def errors(prediction, eps, x_0, offsets=offsets):
            made = [
                ops.diffusion_mse_from_noise(prediction, x_0, eps, offsets, objective, backend="triton")
                for objective in ("ddpm", "flow")
            ]
            return ops.diffusion_mse(prediction, eps - x_0, offsets, backend="triton"), *made

        compiled = torch.compile(errors, fullgraph=True, backend="aot_eager")
        assert_same_bits(run(compiled, tensors), run(errors, tensors))


def test_fake_tensors_have_the_shapes_and_strides_of_real_ones_and_run_no_kernel(monkeypatch):
    tensors, offsets = mse_case(LITTLE, torch.bfloat16)
    tensors = {name: STORED[0](x) for name, x in tensors.items()}
    real = run(lambda *inputs: kernel.diffusion_mse(*inputs[:2], offsets, inputs[2]), tensors)
    for name in ("forward", "mean", "backward"):
        monkeypatch.delattr(kernel, f"diffusion_mse_{name}_kernel")
    with FakeTensorMode() as mode:
        leaves = [mode.from_tensor(x).requires_grad_() for x in tensors.values()]
        out = kernel.diffusion_mse(*leaves[:2], mode.from_tensor(offsets), leaves[2])
        fake = [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]
    for got, expected in zip(fake, real.values(), strict=True):
        assert (got.shape, got.dtype, got.stride()) == (expected.shape, expected.dtype, expected.stride())
