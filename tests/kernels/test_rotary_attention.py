"""Rotary embedding and attention of one projection, in Triton's interpreter: one gradient, written once."""

from functools import partial

import pytest
import torch
from op_checks import assert_registered
from pointwise_cases import nan_in_new_memory
from torch.utils._python_dispatch import TorchDispatchMode

from transfusion_fast.kernels import launch
from transfusion_fast.kernels.layout import AttentionLayout
from transfusion_fast.model import ops

pytestmark = pytest.mark.skipif(not launch.INTERPRETED, reason="needs Triton's interpreter: TRITON_INTERPRET=1")

LAYOUT = AttentionLayout.from_spans([12, 70, 3], [(2, 5), (20, 9)], 90)
SMALL = AttentionLayout.from_spans([12, 8], [(2, 5)])  # without padding, whose log-sum-exp is not written
NORM = pytest.mark.parametrize("norm", [False, True], ids=["rotation", "norm and rotation"])

assert_equal = partial(torch.testing.assert_close, rtol=0, atol=0)


def table(layout):
    return ops.rotary(3 * torch.arange(layout.total_length), 32)


def tensors(heads, norm, dtype=torch.float32, layout=LAYOUT):
    generator, (H, G) = torch.Generator().manual_seed(0), heads
    shapes = [(layout.total_length, H + 2 * G, 32), *([(32,)] * 2 if norm else [])]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def fused(G, layout=LAYOUT):
    def op(qkv, q_weight=None, k_weight=None):
        weights = {"q_weight": q_weight, "k_weight": k_weight}
        return ops.rotary_attention(qkv, G, table(layout), layout, **weights, backend="triton")

    return op


def apart(G):
    """Run the same kernels as two ops, whose gradients autograd joins."""

    def op(qkv, q_weight=None, k_weight=None):
        q, k, v = qkv.split([qkv.shape[1] - 2 * G, G, G], dim=1)
        q, k = ops.rope(q, k, table(LAYOUT), q_weight=q_weight, k_weight=k_weight, backend="triton")
        return ops.hybrid_attention(q, k, v, LAYOUT, backend="triton")

    return op


def run(op, inputs):
    leaves = [x.detach().requires_grad_() for x in inputs]
    output = op(*leaves)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    return [output.detach(), *torch.autograd.grad(output, leaves, upstream)]


@NORM
@pytest.mark.parametrize(
    ("heads", "dtype"),
    [((4, 2), torch.float32), ((4, 2), torch.bfloat16), ((3, 3), torch.float32), ((2, 1), torch.float32)],
    ids=str,
)
def test_outputs_and_gradients_have_the_bits_of_the_two_ops(heads, norm, dtype):
    inputs = tensors(heads, norm, dtype)
    with nan_in_new_memory():
        got = run(fused(heads[1]), inputs)
    assert_equal(got, run(apart(heads[1]), inputs))


@NORM
def test_compiled_in_one_graph_it_computes_the_same(norm):
    op, inputs = fused(1, SMALL), tensors((2, 1), norm, layout=SMALL)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    assert_equal(run(compiled, inputs), run(op, inputs))


@NORM
def test_the_ops_are_registered_as_pytorch_wants_them(norm):
    names = assert_registered(fused(1, SMALL), tensors((2, 1), norm, layout=SMALL))
    assert names == ["rope", "rotary_attention", "rotary_attention_backward"]


class Shapes(TorchDispatchMode):
    """A mode that keeps the ops that return a tensor of the shape of the projection."""

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        first = result[0] if isinstance(result, (list, tuple)) else result
        if first.shape == (90, 8, 32):
            self.ops.append(function._schema.name)
        return result


def test_no_other_op_writes_a_tensor_of_the_size_of_the_projection_in_backward():
    for op, written in ((fused(2), ["transfusion_fast::rotary_attention_backward"]), (apart(2), ["aten::cat"])):
        [qkv] = (x.requires_grad_() for x in tensors((4, 2), norm=False))
        output = op(qkv).sum()
        with Shapes() as seen:
            torch.autograd.grad(output, qkv)
        assert [name for name in seen.ops if not name.endswith(("detach", "view"))] == written


def test_where_one_of_the_ops_runs_elsewhere_each_runs_on_its_backend():
    [qkv] = tensors((4, 2), norm=False)
    mixed = ops.rotary_attention(qkv, 2, table(LAYOUT), LAYOUT, backend={"rope": "torch", "hybrid_attention": "triton"})
    torch.testing.assert_close(mixed, fused(2)(qkv), rtol=1e-5, atol=1e-5)
