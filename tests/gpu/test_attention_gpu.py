"""The attention kernels as a GPU runs them, compiled and in parallel, against the references at real sizes."""

import attention_cases
import mixes
import pytest
import torch

from transfusion_fast.kernels.layout import AttentionLayout
from transfusion_fast.model import ops

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(scope="module", autouse=True)
def compiled():
    from transfusion_fast.kernels import launch

    assert not launch.INTERPRETED, "kernels must be compiled here: set TRITON_INTERPRET=0"


def triton(q, k, v, layout, scale=None):
    return ops.hybrid_attention(q, k, v, layout, scale=scale, backend="triton")


def assert_accurate(layout, heads, dim, dtype):
    layout = layout.to("cuda")
    inputs = attention_cases.qkv(layout, heads, dim, dtype)
    attention_cases.assert_accurate(attention_cases.run(triton, inputs, layout), inputs, layout)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spans", attention_cases.SPANS.values(), ids=attention_cases.SPANS)
def test_hard_layouts(spans, dtype):
    assert_accurate(AttentionLayout.from_spans(*spans), (4, 2), 64, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [32, 48, 64, 96, 128, 256])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (4, 1)], ids=str)
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


def test_padding_spreads_nothing():
    layout = AttentionLayout.from_spans([300, 20, 31], [(10, 140)], total_length=500, device="cuda")
    inputs = attention_cases.qkv(layout, (4, 2), 128, torch.bfloat16)
    do = attention_cases.upstream(inputs[0])
    expected = attention_cases.run(triton, inputs, layout, do=do)
    for x in (*inputs, do):
        x[351:] = float("nan")
    attention_cases.assert_same_bits(attention_cases.run(triton, inputs, layout, do=do), expected)


def test_a_hundred_layouts_of_one_length_are_compiled_once():
    from transfusion_fast.kernels import attention_kernels

    kernels = [getattr(attention_kernels, f"hybrid_attention_{name}_kernel")
               for name in ("forward", "backward_dq", "backward_dkdv")]  # fmt: skip

    def compilations():
        return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())

    def step(seed):
        lengths, spans = mixes.generate("mixed", 2048, seed)
        # A long and a short document more, so that both heights of tiles are there.
        layout = AttentionLayout.from_spans([*lengths, 200, 30], spans, total_length=2048 + 256, device="cuda")
        inputs = attention_cases.qkv(layout, (4, 2), 64, torch.bfloat16)
        attention_cases.run(triton, inputs, layout)

    step(0)
    first = compilations()
    for seed in range(1, 100):
        step(seed)
    assert compilations() == first


def test_torch_compile_takes_the_op_whole():
    layout = mixes.sample("mixed", 2048).to("cuda")
    inputs = attention_cases.qkv(layout, (4, 2), 64, torch.bfloat16)
    whole = torch.compile(triton, fullgraph=True)
    attention_cases.assert_same_bits(
        attention_cases.run(whole, inputs, layout), attention_cases.run(triton, inputs, layout)
    )
