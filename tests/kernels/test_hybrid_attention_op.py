"""The attention kernels as ops of PyTorch: registration, compilation, specialization and checkpointing."""

from functools import partial
from itertools import accumulate

import pytest
import torch
from attention_cases import assert_same_bits, qkv, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_checks import assert_registered
from pointwise_cases import heads_first
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from transfusion_fast.kernels import attention_kernels, launch
from transfusion_fast.kernels.layout import AttentionLayout
from transfusion_fast.model import ops

pytestmark = pytest.mark.skipif(not launch.INTERPRETED, reason="needs Triton's interpreter: TRITON_INTERPRET=1")

LAYOUT = AttentionLayout.from_spans([12, 3], [(2, 5), (13, 2)])
KERNELS = [f"hybrid_attention_{name}_kernel" for name in ("forward", "backward_dq", "backward_dkdv")]


def triton(q, k, v, layout, scale=None):
    return ops.hybrid_attention(q, k, v, layout, scale=scale, backend="triton")


def replace_kernels(monkeypatch, stand_in):
    """Replace every kernel by `stand_in(name, kernel)` and return the replacements."""
    found = [stand_in(name, getattr(attention_kernels, name)) for name in KERNELS]
    for name, kernel in zip(KERNELS, found, strict=True):
        monkeypatch.setattr(attention_kernels, name, kernel)
    return found


class Launched:
    """A stand-in for a kernel that calls `launch(grid, args, options)`."""

    def __init__(self, launch):
        self.launch = launch

    def __getitem__(self, grid):
        return lambda *args, **options: self.launch(grid, args, options)


@pytest.fixture
def launched(monkeypatch):
    """Record the names of the kernels in the order of their launches."""
    names = []

    def stand_in(name, kernel):
        return Launched(lambda grid, args, options: (names.append(name), kernel[grid](*args, **options)))

    replace_kernels(monkeypatch, stand_in)
    return names


@pytest.mark.parametrize(
    ("stored", "copies"),
    [(torch.clone, []), (heads_first, []), (torch.clone, [(8, 4, 7)])],
    ids=["tokens first", "heads first", "noised copies"],
)
def test_the_ops_are_registered_as_pytorch_wants_them(stored, copies):
    layout = AttentionLayout.from_spans([12, 3], [(2, 5), (13, 2)], noised_copies=copies)
    inputs = [stored(x) for x in qkv(layout, heads=(2, 1), dim=16)]
    names = assert_registered(lambda *qkv: triton(*qkv, layout), inputs)
    assert names == ["hybrid_attention", "hybrid_attention_backward"]


def test_compiled_in_one_graph_it_computes_the_same():
    compiled = torch.compile(triton, fullgraph=True, backend="aot_eager")
    for heads in ((2, 1), (2, 2)):
        inputs = qkv(LAYOUT, heads, dim=16)
        assert_same_bits(run(compiled, inputs, LAYOUT), run(triton, inputs, LAYOUT))


def test_a_hundred_layouts_of_one_length_are_compiled_once(monkeypatch):
    """The layouts have 2 to 200 documents in 2 to 6 tiles. No kernel runs, because only tracing matters."""
    replace_kernels(monkeypatch, lambda name, kernel: Launched(lambda *_: None))
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


class Specialization(Launched):
    """A stand-in for a kernel that keeps what Triton would compile, by the height of the tiles."""

    def __init__(self, name, kernel):
        super().__init__(self.specialize)
        self.jitted = JITFunction(kernel.fn, **kernel.kwargs)
        self.bind = create_function_from_signature(self.jitted.signature, self.jitted.params, BACKEND)
        self.keys = set()

    def specialize(self, grid, args, options):
        bound, key, others = self.bind(*args, **options)
        assert len(bound) == len(self.jitted.params)
        self.keys.add((bound["SHARED"], str(key), str(others)))


@pytest.fixture
def specializations(monkeypatch):
    return replace_kernels(monkeypatch, Specialization)


@given(st.lists(st.integers(1, 200), max_size=8), st.integers(0, 1600))
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_layout_of_one_length_makes_a_kernel_compile_again(specializations, lengths, image):
    """There is one binary for tall tiles and one for short ones. Layouts differ in data and unspecialized numbers."""
    spans = [(sum(lengths[:1]), min(lengths[1], image))] if len(lengths) > 1 and image else []
    layout = AttentionLayout.from_spans(lengths, spans, 1600)
    assert_one_binary_for_each_height(specializations, layout)


@given(st.lists(st.tuples(st.integers(1, 200), st.integers(1, 200)), min_size=1, max_size=4))
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_layout_with_copies_makes_a_kernel_compile_again(specializations, documents):
    ends = list(accumulate(map(sum, documents)))
    copies = [(end - length, length, end - length) for end, (_, length) in zip(ends, documents, strict=True)]
    layout = AttentionLayout.from_spans([sum(pair) for pair in documents], [], 1600, noised_copies=copies)
    assert_one_binary_for_each_height(specializations, layout)


def assert_one_binary_for_each_height(specializations, layout):
    triton(*(x.requires_grad_() for x in qkv(layout, dim=16)), layout).sum().backward()
    for kernel in specializations:
        heights = [key[0] for key in kernel.keys]
        assert len(heights) == len(set(heights)), kernel.keys


def test_layouts_with_and_without_copies_have_a_binary_each(specializations):
    """The second interval is no argument of the binary for layouts without copies, so they cannot pay for it."""
    for copies in ([], [(70, 66, 70), (136, 3, 70)]):
        layout = AttentionLayout.from_spans([139, 3], [], noised_copies=copies)
        triton(*(x.requires_grad_() for x in qkv(layout, dim=16)), layout).sum().backward()
    for kernel in specializations:
        assert sorted(key[0] for key in kernel.keys) == [False, False, True, True]


def test_another_dtype_is_another_specialization(specializations):
    """So that the test above can fail."""
    layout = AttentionLayout.from_spans([65, 3], [])
    for dtype in (torch.float16, torch.bfloat16):
        triton(*qkv(layout, dim=16, dtype=dtype), layout)
    assert len(specializations[0].keys) == 4
    assert {key[0] for key in specializations[0].keys} == {False, True}


class Block(torch.nn.Module):
    """A block of a model, with computations before and after its attention."""

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


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (None, KERNELS),
        ({}, [KERNELS[0], *KERNELS]),
        ({"context_fn": partial(create_selective_checkpoint_contexts, save_attention)}, KERNELS),
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
