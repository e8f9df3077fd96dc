"""The attention kernels as ops of PyTorch: what compilation, fake tensors and checkpointing see of them."""

from functools import partial

import pytest
import torch
from attention_cases import NAMES, assert_same_bits, qkv, run, upstream
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from transfusion_fast.kernels import attention_kernels, launch
from transfusion_fast.kernels import hybrid_attention as kernel
from transfusion_fast.kernels.layout import AttentionLayout
from transfusion_fast.model import ops

pytestmark = pytest.mark.skipif(not launch.INTERPRETED, reason="needs Triton's interpreter: TRITON_INTERPRET=1")

LAYOUT = AttentionLayout.from_spans([70, 3], [(2, 5), (71, 2)])
LITTLE = AttentionLayout.from_spans([7, 3], [(2, 5)])
TABLES = ("key_start", "key_end", "query_start", "query_end", "query_tiles", "key_tiles", "tile_counts")


def triton(q, k, v, layout, scale=None):
    return ops.hybrid_attention(q, k, v, layout, scale=scale, backend="triton")


def tables(layout):
    return [getattr(layout, name) for name in TABLES]


def inputs_of(layout, stored):
    """q, k, v that need gradients, [T, H, D] as such or as views of [H, T, D]."""
    q, k, v = qkv(layout, heads=(2, 1), dim=16)
    if stored == "heads first":
        q, k, v = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v))
    return [x.requires_grad_() for x in (q, k, v)]


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels in the order in which they were asked for."""
    names, launches = [], kernel._launches

    def record(name, *args):
        names.append(name)
        return launches(name, *args)

    monkeypatch.setattr(kernel, "_launches", record)
    return names


@pytest.mark.parametrize("stored", ["tokens first", "heads first"])
def test_the_forward_op_is_registered_as_pytorch_wants_it(stored):
    """Schema, autograd, fake tensors of the real shapes and strides, and tracing with dynamic shapes."""
    torch.library.opcheck(kernel._forward, (*inputs_of(LITTLE, stored), *tables(LITTLE), 0.25))


@pytest.mark.parametrize("stored", ["tokens first", "heads first"])
def test_the_backward_op_is_registered_as_pytorch_wants_it(stored):
    inputs = [x.detach() for x in inputs_of(LITTLE, stored)]
    out, lse = kernel._forward(*inputs, *tables(LITTLE), 0.25)
    torch.library.opcheck(kernel._backward, (upstream(out), *inputs, out, lse, *tables(LITTLE), 0.25))


@pytest.mark.parametrize("stored", ["tokens first", "heads first"])
def test_fake_tensors_have_the_shapes_and_strides_of_real_ones(stored, launched):
    def results(layout, inputs):
        out = triton(*inputs, layout)
        return [out, *torch.autograd.grad(out, inputs, torch.ones_like(out))]

    real = results(LAYOUT, inputs_of(LAYOUT, stored))
    ran = len(launched)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = results(LAYOUT, [mode.from_tensor(x) for x in inputs_of(LAYOUT, stored)])
    assert len(launched) == ran == 3, "no kernel runs on fake tensors"
    for name, got, expected in zip(NAMES, fake, real, strict=True):
        assert (got.shape, got.dtype, got.stride()) == (expected.shape, expected.dtype, expected.stride()), name


def test_compiled_in_one_graph_it_computes_the_same():
    compiled = torch.compile(triton, fullgraph=True, backend="aot_eager")
    for heads in ((2, 1), (2, 2)):
        inputs = qkv(LAYOUT, heads)
        assert_same_bits(run(compiled, inputs, LAYOUT), run(triton, inputs, LAYOUT))


def test_a_hundred_layouts_of_one_length_are_compiled_once(monkeypatch):
    """Of 2 to 200 documents, in 2 to 6 tiles, forward and backward. No kernel runs: only tracing is looked at."""
    monkeypatch.setattr(kernel, "_launches", lambda *_: iter(()))
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(triton, fullgraph=True, backend=counter)
    tiles = set()
    for length in range(1, 101):
        layout = AttentionLayout.from_spans([length] * (200 // length), [(0, length)], 200)
        tiles.add(tuple(layout.tile_counts.tolist()))
        compiled(*(x.requires_grad_() for x in qkv(layout, dim=16)), layout).sum().backward()
    assert len(tiles) > 10
    assert counter.frame_count == 1


BACKEND = make_backend(GPUTarget("cuda", 90, 32))


class Specialization:
    """Stands in for a kernel and keeps what Triton would compile it for, by the family of tiles."""

    def __init__(self, interpreted):
        self.jitted = JITFunction(interpreted.fn, **interpreted.kwargs)
        self.bind = create_function_from_signature(self.jitted.signature, self.jitted.params, BACKEND)
        self.keys = set()

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *args, **kwargs):
        bound, key, options = self.bind(*args, **kwargs)
        assert len(bound) == len(self.jitted.params)
        self.keys.add((bound["SHARED"], str(key), str(options)))


@pytest.fixture
def specializations(monkeypatch):
    names = [f"hybrid_attention_{name}_kernel" for name in ("forward", "backward_dq", "backward_dkdv")]
    kernels = [Specialization(getattr(attention_kernels, name)) for name in names]
    for name, stand_in in zip(names, kernels, strict=True):
        monkeypatch.setattr(attention_kernels, name, stand_in)
    return kernels


@given(st.lists(st.integers(1, 200), max_size=8), st.integers(0, 1600))
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_layout_of_one_length_makes_a_kernel_compile_again(specializations, lengths, image):
    """One binary for tall tiles and one for short ones. What differs between layouts is data, or not specialized on."""
    spans = [(sum(lengths[:1]), min(lengths[1], image))] if len(lengths) > 1 and image else []
    layout = AttentionLayout.from_spans(lengths, spans, 1600)
    inputs = qkv(layout, heads=(2, 1), dim=16)
    triton(*(x.requires_grad_() for x in inputs), layout).sum().backward()
    for stand_in in specializations:
        families = [key[0] for key in stand_in.keys]
        assert len(families) == len(set(families)), stand_in.keys


def test_the_specialization_of_a_kernel_is_seen(specializations):
    """So that the test above can fail: other dtypes and alignments are other kernels."""
    layout = AttentionLayout.from_spans([65, 3], [])
    for dtype in (torch.float16, torch.bfloat16):
        triton(*qkv(layout, dim=16, dtype=dtype), layout)
    assert len(specializations[0].keys) == 4
    assert {key[0] for key in specializations[0].keys} == {False, True}


# Checkpointing: a block that computes q, k and v, attends, and computes on.


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.project = torch.nn.Parameter(torch.randn(16, 3 * 32, generator=generator) / 4)

    def forward(self, x):
        q, k, v = (x @ self.project).unflatten(1, (3, 2, 16)).unbind(1)
        return triton(q, k, v, LAYOUT).flatten(1).tanh()


def save_attention(context, op, *args, **kwargs):
    is_attention = op == torch.ops.transfusion_fast.hybrid_attention.default
    return CheckpointPolicy.MUST_SAVE if is_attention else CheckpointPolicy.PREFER_RECOMPUTE


FORWARD, BACKWARD = ["forward"], ["backward_dq", "backward_dkdv"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (None, FORWARD + BACKWARD),
        ({}, FORWARD + FORWARD + BACKWARD),
        ({"context_fn": partial(create_selective_checkpoint_contexts, save_attention)}, FORWARD + BACKWARD),
    ],
    ids=["no checkpoint", "all recomputed", "attention saved"],
)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_checkpointing_recomputes_attention_only_where_it_is_not_saved(options, expected, compiled, launched):
    block = Block()
    x = torch.randn(LAYOUT.total_length, 16, generator=torch.Generator().manual_seed(1))

    def gradients(forward):
        leaf = x.clone().requires_grad_()
        forward(leaf).square().sum().backward()
        found = [leaf.grad, block.project.grad.clone()]
        block.zero_grad()
        return found

    def checkpointed(x):
        return block(x) if options is None else checkpoint(block, x, use_reentrant=False, **options)

    wanted = gradients(block)
    launched.clear()
    got = gradients(torch.compile(checkpointed, backend="aot_eager", fullgraph=True) if compiled else checkpointed)
    assert launched == expected
    for one, other in zip(got, wanted, strict=True):
        assert torch.equal(one, other)
