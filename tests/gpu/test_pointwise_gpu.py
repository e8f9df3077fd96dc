"""The kernels of rope, RMS norm, SwiGLU and the diffusion error as a GPU runs them, compiled and in parallel."""

from functools import partial

import pytest
import torch
from pointwise_cases import (
    DTYPES,
    IMAGES,
    KERNELS,
    NORM_SHAPES,
    ROPE_SHAPES,
    STORED,
    SWIGLU_SHAPES,
    assert_accurate,
    assert_nan_where_the_reference_has_it,
    assert_same_bits,
    assert_writes_stay_inside,
    heads_first,
    mse_case,
    norm_case,
    rope_case,
    run,
    swiglu_case,
    upstreams,
)

from transfusion_fast.model import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.usefixtures("compiled_kernels"),
]

EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
CUDA = {"device": "cuda"}


@EACH_DTYPE
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("shape", ROPE_SHAPES.values(), ids=ROPE_SHAPES)
def test_hard_shapes_of_rope(shape, norm, dtype):
    assert_accurate(rope_case(shape, dtype, norm, **CUDA))


@EACH_DTYPE
@pytest.mark.parametrize("dim", [32, 48, 64, 96, 128, 256])
@pytest.mark.parametrize("heads", [(16, 16), (16, 4), (12, 12), (32, 8), (16, 1)], ids=str)
def test_rope_in_the_sizes_of_models(heads, dim, dtype):
    assert_accurate(rope_case((517, *heads, dim), dtype, **CUDA))


@EACH_DTYPE
@pytest.mark.parametrize("shape", [*NORM_SHAPES, (1000, 2048), (1000, 4096)], ids=str)
def test_hard_shapes_of_rms_norm(shape, dtype):
    assert_accurate(norm_case(shape, dtype, **CUDA))


@EACH_DTYPE
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("shape", [*SWIGLU_SHAPES[:-1], (1000, 2816), (1000, 768)], ids=str)
def test_hard_shapes_of_swiglu(shape, fused, dtype):
    assert_accurate(swiglu_case(shape, dtype, fused, **CUDA))


@EACH_DTYPE
@pytest.mark.parametrize("target", [{"flow": False}, {}, {"coefficients": True}], ids=str)
@pytest.mark.parametrize("images", [*IMAGES.values(), ([256] * 40 + [1024, 7], 64)], ids=[*IMAGES, "a batch"])
def test_hard_lists_of_images(images, target, dtype):
    assert_accurate(mse_case(images, dtype, **target, **CUDA))


CASES = {
    "rope": partial(rope_case, (300, 6, 2, 64), **CUDA),
    "rms_norm": partial(norm_case, (300, 1100), **CUDA),
    "swiglu": partial(swiglu_case, (30, 1100), **CUDA),
    "diffusion_mse": partial(mse_case, IMAGES["pieces that images share"], **CUDA),
}
LARGE = {
    "rope": partial(rope_case, (8192, 16, 4, 128), **CUDA),
    "rms_norm": partial(norm_case, (8192, 2048), **CUDA),
    "swiglu": partial(swiglu_case, (8192, 2816), fused=True, **CUDA),
    "diffusion_mse": partial(mse_case, ([256] * 64 + [65_536, 1, 3], 64), **CUDA),
}
EACH_OP = pytest.mark.parametrize("make", CASES.values(), ids=CASES)


@EACH_DTYPE
@EACH_OP
@pytest.mark.parametrize("stored", [*STORED, heads_first])
def test_the_memory_layout_of_the_inputs_changes_nothing(stored, make, dtype):
    """Other strides and addresses are other binaries, with other loads."""
    case = make(dtype)
    moved = {name: stored(x) if x.ndim > 1 else x for name, x in case.tensors.items()}
    assert_same_bits(run(case.kernel, moved), run(case.kernel, {name: x.contiguous() for name, x in moved.items()}))


@EACH_OP
def test_nan_comes_out_where_the_reference_has_it_and_nowhere_else(make):
    case = make()
    for name, x in case.tensors.items():
        spoiled = x.clone()
        spoiled.view(-1)[-40] = float("nan")
        assert_nan_where_the_reference_has_it(case.with_tensors(**{name: spoiled}))


@EACH_DTYPE
@EACH_OP
def test_partial_tiles_write_to_nothing_but_outputs_and_gradients(make, dtype, monkeypatch):
    assert_writes_stay_inside(make(dtype), monkeypatch)


@EACH_DTYPE
@pytest.mark.parametrize("make", LARGE.values(), ids=LARGE)
def test_repeated_passes_give_equal_bits(make, dtype):
    """Programs run in another order each time; no sum may depend on it."""
    case = make(dtype)
    expected = run(case.kernel, case.tensors)
    for _ in range(20):
        assert_same_bits(run(case.kernel, case.tensors), expected)


@EACH_OP
def test_torch_compile_takes_the_op_in_one_graph(make):
    case = make(torch.bfloat16)
    assert_same_bits(run(torch.compile(case.kernel, fullgraph=True), case.tensors), run(case.kernel, case.tensors))


def test_a_hundred_lists_of_images_are_compiled_once(compilations):
    def step(images):
        case = mse_case(([images] * images, 16), **CUDA)
        run(case.kernel, case.tensors)

    kernels = [getattr(module, name) for module, name in KERNELS if "mse" in name]
    step(1)
    first = compilations(kernels)
    for images in range(2, 101):
        step(images)
    assert compilations(kernels) == first > 0


# Tensors of more than 2^31 numbers: their end is computed like a short tensor that holds only the end.

END = 2**31 + 4096


def test_swiglu_beyond_32_bits():
    case = swiglu_case((4096,), torch.bfloat16, **CUDA)
    long = [torch.cat([x.new_zeros(END - 4096), x]) for x in case.tensors.values()]
    assert torch.equal(case.kernel(*long)[-4096:], case.kernel(*case.tensors.values()))


def test_rope_beyond_32_bits():
    T = END // (16 * 128)
    positions = torch.arange(T, device="cuda") - (T - 2)
    short = rope_case((2, 16, 1, 128), torch.bfloat16, False, "cuda", positions[-2:])
    q, k = (torch.cat([x.new_zeros(T - 2, *x.shape[1:]), x]) for x in short.tensors.values())
    got = ops.rope(q, k, positions, backend="triton")
    for one, other in zip(got, short.kernel(*short.tensors.values()), strict=True):
        assert torch.equal(one[-2:], other)


def test_the_diffusion_error_beyond_32_bits():
    P = END // 16
    case = mse_case(([3, 5], 16), torch.bfloat16, flow=False, **CUDA)
    upstream = upstreams([torch.empty(3)])[0].cuda()

    def errors_and_gradient(prediction, target, offsets, upstream):
        leaf = prediction.requires_grad_()
        errors = ops.diffusion_mse(leaf, target, offsets, backend="triton")
        return errors.detach(), *torch.autograd.grad(errors, leaf, upstream)

    expected, expected_gradient = errors_and_gradient(*case.tensors.values(), case.saved[-1], upstream[1:])
    long = [torch.cat([x.detach().new_zeros(P - 8, 16), x.detach()]) for x in case.tensors.values()]
    shifted = torch.tensor([0, P - 8, P - 5, P], dtype=torch.int32, device="cuda")
    errors, gradient = errors_and_gradient(*long, shifted, upstream)
    assert torch.equal(gradient[-8:], expected_gradient)
    torch.testing.assert_close(errors[1:], expected, rtol=1e-6, atol=0)
    assert errors[0] == 0 and not gradient[:-8].any()


def test_positions_on_the_gpu_give_the_rotation_of_the_cpu(tolerance):
    tensors = rope_case((21, 6, 2, 32)).tensors
    positions = torch.stack([torch.arange(21) // 5, torch.arange(21) % 5], dim=1)
    expected = ops.rope(tensors["q"], tensors["k"], positions, backend="torch")
    got = ops.rope(tensors["q"].cuda(), tensors["k"].cuda(), positions.cuda(), backend="triton")
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one.cpu(), other, **tolerance["fp32"])
