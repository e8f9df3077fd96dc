"""The kernels of rope, SwiGLU and the diffusion error as a GPU runs them, compiled and in parallel."""

import pytest
import torch
from pointwise_cases import (
    DTYPES,
    IMAGES,
    ROPE_SHAPES,
    STORED,
    SWIGLU_SHAPES,
    assert_accurate,
    assert_nan_where_the_reference_has_it,
    assert_same_bits,
    assert_writes_stay_inside,
    heads_first,
    mse_case,
    mse_of,
    rope_case,
    rope_of,
    run,
    swiglu_case,
    swiglu_ops,
    upstreams,
)

from transfusion_fast.model import ops

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SWIGLU = swiglu_ops()


@pytest.fixture(scope="module", autouse=True)
def compiled():
    from transfusion_fast.kernels import launch

    assert not launch.INTERPRETED, "kernels must be compiled here: set TRITON_INTERPRET=0"


def rope(shape, dtype=torch.float32, norm=True):
    tensors, table = rope_case(shape, dtype, norm, "cuda")
    return rope_of(table), tensors


def swiglu(shape, dtype=torch.float32, fused=False):
    return SWIGLU, swiglu_case(shape, dtype, fused, "cuda")


def mse(images, dtype=torch.float32, flow=True):
    tensors, offsets = mse_case(images, dtype, flow, "cuda")
    return mse_of(offsets), tensors


@EACH_DTYPE
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("shape", ROPE_SHAPES.values(), ids=ROPE_SHAPES)
def test_hard_shapes_of_rope(shape, norm, dtype):
    assert_accurate(*rope(shape, dtype, norm))


@EACH_DTYPE
@pytest.mark.parametrize("dim", [32, 48, 64, 96, 128, 256])
@pytest.mark.parametrize("heads", [(16, 16), (16, 4), (12, 12), (32, 8), (16, 1)], ids=str)
def test_rope_of_the_sizes_of_models(heads, dim, dtype):
    assert_accurate(*rope((517, *heads, dim), dtype))


@EACH_DTYPE
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("shape", [*SWIGLU_SHAPES[:-1], (1000, 2816), (1000, 768)], ids=str)
def test_hard_shapes_of_swiglu(shape, fused, dtype):
    assert_accurate(*swiglu(shape, dtype, fused))


@EACH_DTYPE
@pytest.mark.parametrize("flow", [False, True])
@pytest.mark.parametrize("images", [*IMAGES.values(), ([256] * 40 + [1024, 7], 64)], ids=[*IMAGES, "a batch"])
def test_hard_lists_of_images(images, flow, dtype):
    assert_accurate(*mse(images, dtype, flow))


CASES = {
    "rope": lambda dtype: rope((300, 6, 2, 64), dtype),
    "swiglu": lambda dtype: swiglu((30, 1100), dtype),
    "diffusion_mse": lambda dtype: mse(IMAGES["pieces that images share"], dtype),
}
LARGE = {
    "rope": lambda dtype: rope((8192, 16, 4, 128), dtype),
    "swiglu": lambda dtype: swiglu((8192, 2816), dtype, fused=True),
    "diffusion_mse": lambda dtype: mse(([256] * 64 + [65_536, 1, 3], 64), dtype),
}
EACH_OP = pytest.mark.parametrize("op", CASES)


@EACH_DTYPE
@EACH_OP
@pytest.mark.parametrize("stored", STORED)
def test_how_tensors_are_stored_changes_nothing(stored, op, dtype):
    """Other strides and addresses are other binaries, with other loads."""
    (kernel, *_), tensors = CASES[op](dtype)
    moved = {name: stored(x) if x.ndim > 1 else x for name, x in tensors.items()}
    assert_same_bits(run(kernel, moved), run(kernel, tensors))


def test_heads_may_be_stored_first():
    (kernel, *_), tensors = CASES["rope"](torch.bfloat16)
    moved = {name: heads_first(x) if x.ndim == 3 else x for name, x in tensors.items()}
    assert_same_bits(run(kernel, moved), run(kernel, tensors))


@EACH_OP
def test_nan_comes_out_where_the_reference_has_it_and_nowhere_else(op):
    operations, tensors = CASES[op](torch.float32)
    for name in tensors:
        spoiled = tensors | {name: tensors[name].clone()}
        spoiled[name].view(-1)[-40] = float("nan")
        assert_nan_where_the_reference_has_it(operations, spoiled)


@EACH_DTYPE
@EACH_OP
def test_tiles_that_are_not_whole_write_to_nothing_beside_outputs_and_gradients(op, dtype, monkeypatch):
    (kernel, *_), tensors = CASES[op](dtype)
    assert_writes_stay_inside(kernel, tensors, monkeypatch)


@EACH_DTYPE
@EACH_OP
def test_repeated_passes_give_equal_bits(op, dtype):
    """Programs run in another order each time; no sum may depend on it."""
    (kernel, *_), tensors = LARGE[op](dtype)
    expected = run(kernel, tensors)
    for _ in range(20):
        assert_same_bits(run(kernel, tensors), expected)


@EACH_OP
def test_torch_compile_takes_the_op_whole(op):
    (kernel, *_), tensors = CASES[op](torch.bfloat16)
    assert_same_bits(run(torch.compile(kernel, fullgraph=True), tensors), run(kernel, tensors))


def test_a_hundred_lists_of_images_are_compiled_once():
    from transfusion_fast.kernels import diffusion_mse

    kernels = [getattr(diffusion_mse, f"diffusion_mse_{name}_kernel") for name in ("forward", "mean", "backward")]

    def compilations():
        return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())

    def step(images):
        (kernel, *_), tensors = mse(([images] * images, 16))
        run(kernel, tensors)

    step(1)
    first = compilations()
    for images in range(2, 101):
        step(images)
    assert compilations() == first


# More numbers than 32 bits count: the end is what a short tensor gives that is only the end.

END = 2**31 + 4096


def test_swiglu_beyond_32_bits():
    tensors = swiglu_case((4096,), torch.bfloat16, device="cuda")
    long = {name: torch.cat([x.new_zeros(END - 4096), x]) for name, x in tensors.items()}
    assert torch.equal(SWIGLU[0](*long.values())[-4096:], SWIGLU[0](*tensors.values()))


def test_rope_beyond_32_bits():
    T = END // (16 * 128)
    (q, k), table = [
        x.values() if isinstance(x, dict) else x for x in rope_case((2, 16, 1, 128), torch.bfloat16, False)
    ]
    table = type(table)(*(x.cuda() for x in table))
    q, k = q.cuda(), k.cuda()
    long_q, long_k = (torch.cat([x.new_zeros(T - 2, *x.shape[1:]), x]) for x in (q, k))
    long_table = type(table)(*(torch.cat([x.new_zeros(T - 2, 64), x]) for x in table))
    for got, expected in zip(rope_of(long_table)[0](long_q, long_k), rope_of(table)[0](q, k), strict=True):
        assert torch.equal(got[-2:], expected)


def test_the_diffusion_error_beyond_32_bits():
    P = END // 16
    tensors, offsets = mse_case(([3, 5], 16), torch.bfloat16, flow=False, device="cuda")
    upstream = upstreams([torch.empty(3)])[0].cuda()

    def errors_and_gradient(prediction, target, offsets, upstream):
        leaf = prediction.requires_grad_()
        errors = mse_of(offsets)[0](leaf, target)
        return errors.detach(), *torch.autograd.grad(errors, leaf, upstream)

    expected, expected_gradient = errors_and_gradient(*tensors.values(), offsets, upstream[1:])
    long = [torch.cat([x.detach().new_zeros(P - 8, 16), x.detach()]) for x in tensors.values()]
    shifted = torch.tensor([0, P - 8, P - 5, P], dtype=torch.int32, device="cuda")
    errors, gradient = errors_and_gradient(*long, shifted, upstream)
    assert torch.equal(gradient[-8:], expected_gradient)
    torch.testing.assert_close(errors[1:], expected, rtol=1e-6, atol=0)
    assert errors[0] == 0 and not gradient[:-8].any()


def test_positions_on_the_gpu_are_turned_by_as_on_the_cpu(tolerance):
    tensors, _ = rope_case((21, 6, 2, 32))
    positions = torch.stack([torch.arange(21) // 5, torch.arange(21) % 5], dim=1)
    expected = ops.rope(tensors["q"], tensors["k"], positions, backend="torch")
    got = ops.rope(tensors["q"].cuda(), tensors["k"].cuda(), positions.cuda(), backend="triton")
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one.cpu(), other, **tolerance["fp32"])
