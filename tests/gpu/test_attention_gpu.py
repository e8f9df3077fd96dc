"""The attention kernels as a GPU runs them, compiled and in parallel, against the references at real sizes."""

from itertools import product

import attention_cases
import mixes
import pytest
import torch

from transfusion_fast.kernels import attention_kernels
from transfusion_fast.kernels.layout import AttentionLayout
from transfusion_fast.model import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.usefixtures("compiled_kernels"),
]

EACH_DTYPE = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)


def triton(q, k, v, layout, scale=None):
    return ops.hybrid_attention(q, k, v, layout, scale=scale, backend="triton")


def assert_accurate(layout, heads, dim, dtype):
    layout = layout.to("cuda")
    attention_cases.assert_accurate(triton, layout, attention_cases.qkv(layout, heads, dim, dtype))


HARD = attention_cases.SPANS | attention_cases.COPIES


@EACH_DTYPE
@pytest.mark.parametrize("spans", HARD.values(), ids=HARD)
def test_hard_layouts(spans, dtype):
    assert_accurate(attention_cases.layout_of(spans), (4, 2), 64, dtype)


@pytest.mark.parametrize("dim", [32, 128, 256])
def test_noised_copies(dim):
    (lengths, images, _, copies), text = attention_cases.COPIES["copies as tall as tiles"], 300
    layout = AttentionLayout.from_spans([*lengths, text], images, noised_copies=copies)
    assert_accurate(layout, (4, 1), dim, torch.bfloat16)


# Each compiles six kernels, so that not all dimensions go with all heads.
@EACH_DTYPE
@pytest.mark.parametrize(
    ("heads", "dim"), [*product([(8, 2)], [32, 48, 64, 96, 128, 256]), *product([(4, 4), (4, 1)], [64, 128])], ids=str
)
def test_every_configuration(heads, dim, dtype):
    assert_accurate(mixes.sample("mixed", 2048), heads, dim, dtype)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("mix", mixes.NAMES)
def test_every_mix(mix, dim):
    assert_accurate(mixes.sample(mix, 4096), (2, 1), dim, torch.bfloat16)


@pytest.mark.parametrize("dim", [64, 128])
def test_repeated_passes_give_equal_bits(dim):
    """Programs run in another order each time; no sum may depend on it."""
    layout = mixes.sample("mixed", 16384).to("cuda")
    inputs = attention_cases.qkv(layout, (16, 4), dim, torch.bfloat16)
    expected = attention_cases.run(triton, inputs, layout)
    for _ in range(20):
        attention_cases.assert_same_bits(attention_cases.run(triton, inputs, layout), expected)


def test_padding_affects_nothing():
    layout = AttentionLayout.from_spans([300, 20, 31], [(10, 140)], total_length=500, device="cuda")
    inputs = attention_cases.qkv(layout, (4, 2), 128, torch.bfloat16)
    do = attention_cases.upstream(inputs[0])
    expected = attention_cases.run(triton, inputs, layout, do=do)
    for x in (*inputs, do):
        x[351:] = float("nan")
    attention_cases.assert_same_bits(attention_cases.run(triton, inputs, layout, do=do), expected)


def test_rows_beyond_32_bits_are_addressed():
    """Query and key rows of a fused projection, of which the last ones lie more than 2^31 numbers behind the first."""
    layout = AttentionLayout.from_spans([200, 40], [(0, 200), (210, 9)], device="cuda")
    inputs = attention_cases.qkv(layout, (1, 1), 64, torch.bfloat16)
    projection = torch.empty(240, 2**24 - 16, dtype=torch.bfloat16, device="cuda")
    moved = [projection[:, 64 * n : 64 * (n + 1)].unflatten(1, (1, 64)).copy_(x) for n, x in enumerate(inputs)]
    expected = attention_cases.run(triton, inputs, layout)
    attention_cases.assert_same_bits(attention_cases.run(triton, moved, layout), expected)


def test_a_hundred_layouts_of_one_length_are_compiled_once(compilations):
    def step(seed):
        lengths, spans = mixes.generate("mixed", 2048, seed)
        # One long and one short document more, so that both heights of tiles are there.
        layout = AttentionLayout.from_spans([*lengths, 200, 30], spans, total_length=2048 + 256, device="cuda")
        inputs = attention_cases.qkv(layout, (4, 2), 64, torch.bfloat16)
        attention_cases.run(triton, inputs, layout)

    step(0)
    kernels = [getattr(attention_kernels, name) for name in vars(attention_kernels) if name.endswith("_kernel")]
    first = compilations(kernels)
    for seed in range(1, 100):
        step(seed)
    assert compilations(kernels) == first > 0


def test_torch_compile_takes_the_op_in_one_graph():
    layout = mixes.sample("mixed", 2048).to("cuda")
    inputs = attention_cases.qkv(layout, (4, 2), 64, torch.bfloat16)
    compiled = torch.compile(triton, fullgraph=True)
    expected = attention_cases.run(triton, inputs, layout)
    attention_cases.assert_same_bits(attention_cases.run(compiled, inputs, layout), expected)
