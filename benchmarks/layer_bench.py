"""Count the bytes that a layer moves, op by op, and what the host pays for its kernels' launches; needs no GPU.

    python benchmarks/layer_bench.py --out DIR [--preset 1.4b] [--tokens 16384]

Bytes are counted by dispatch: one block runs forward and backward on tensors without storage, and each op counts its
inputs and outputs once. A unit is E bf16 numbers of a token, where E is the model's width. The host's cost is that of
the whole way from PyTorch to the launch, with compiled kernels and a driver that launches nothing, as a multiple of
`torch.nn.functional.linear` on 64 numbers in the same run. Compilations are counted over batches and lengths.

Writes DIR/layer_bytes.csv, layer_host.csv and layer_bench.md.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import fake_driver  # before the kernels
import mixes
import tables
import torch
import torch.nn.functional as F
from pointwise_report import norm_bytes, rope_bytes
from tables import Row
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import benchmark
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from transfusion_fast.config import PRESETS, TransformerConfig
from transfusion_fast.kernels import attention_kernels, rms_norm, rope, swiglu
from transfusion_fast.kernels.layout import AttentionLayout
from transfusion_fast.model import ops
from transfusion_fast.model.layers import Block

MATRIX = ("mm", "addmm")
_NO_PASS = ("_unsafe_view", "detach", "empty", "new_empty")  # ops that touch no memory, besides views


class _Bytes(TorchDispatchMode):
    """A mode that counts the bytes of every op's inputs and outputs, and the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        namespace, _, name = function._schema.name.partition("::")
        if namespace != "prim" and not function.is_view and name not in _NO_PASS:
            for part, moved in _parts(name, args, _size(args, kwargs, result)).items():
                self.bytes[part] += moved
                self.calls[part] += 1
        return result


def _size(*trees: Any) -> int:
    return sum(x.nbytes for x in tree_leaves(trees) if isinstance(x, Tensor))


def _parts(name: str, args: Sequence[Any], moved: int) -> dict[str, int]:
    """Return the bytes of an op by kernel. Ops that hide traffic, or read only a part of an input, are taken apart."""
    if name == "rms_norm_backward":
        x = args[2]
        return {name: sum(part.once for part in norm_bytes("backward", *x.shape, x.itemsize, args[1] is not None))}
    if not name.startswith("rotary_attention"):
        return {name: moved}
    backward = name.endswith("backward")
    q, k, cos, sin, q_weight, k_weight = args[1 + backward : 7 + backward]
    # Of the projection, attention reads v alone, and it does not read rope's inputs.
    moved -= _size(q, k, cos, sin, q_weight, k_weight)
    if not backward:
        return {"attention": moved}
    norm = q_weight is not None
    shared = rope_bytes(len(q), q.shape[1], k.shape[1], q.shape[2], q.itemsize, norm, backward=True)
    return {"attention_backward": moved, "rope_backward": sum(part.once for part in shared)}


def byte_rows(config: TransformerConfig, T: int) -> list[Row]:
    """Return a row for each op of a block: pass, kind, calls and units."""
    layout = AttentionLayout.from_spans([T], [])
    with FakeTensorMode(allow_non_fake_inputs=True):
        layout = replace(layout, **{n: torch.empty(getattr(layout, n).shape, dtype=torch.int32) for n in _TABLES})
        torch.set_default_dtype(torch.bfloat16)
        block = Block(config, "triton")
        torch.set_default_dtype(torch.float32)
        x = torch.empty(T, config.dim, dtype=torch.bfloat16, requires_grad=True)
        rotary = ops.rotary(torch.zeros(T, dtype=torch.int32), config.head_dim)
        with _Bytes() as forward:
            y = block(x, rotary, layout)
        upstream = torch.empty_like(y)
        with _Bytes() as backward:
            y.backward(upstream)
    found = []
    for name, mode in (("forward", forward), ("backward", backward)):
        for op, moved in mode.bytes.most_common():
            kind = "matrix" if op in MATRIX else "attention" if op.startswith("attention") else "pointwise"
            units = moved / (2 * T * config.dim)
            found.append({"pass": name, "op": op, "kind": kind, "calls": mode.calls[op], "units": round(units, 3)})
    return found


_TABLES = ("key_start", "key_end", "query_start", "query_end", "query_tiles", "key_tiles")


H, G, D = 16, 4, 64


def rotary_attention(T: int, lengths: Sequence[int]) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """Return a call of rotary attention over documents, and the inputs that it is differentiable in."""
    layout, table = AttentionLayout.from_spans(lengths, [], T), ops.rotary(torch.arange(T), D)
    qkv = torch.zeros(T, H + 2 * G, D, dtype=torch.bfloat16, requires_grad=True)
    return lambda: ops.rotary_attention(qkv, G, table, layout, backend="triton"), [qkv]


def hybrid_attention(T: int, lengths: Sequence[int]) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """Return the same of attention alone; q, k and v are views of one projection."""
    layout = AttentionLayout.from_spans(lengths, [], T)
    heads = torch.zeros(T, H + 2 * G, D, dtype=torch.bfloat16).split([H, G, G], dim=1)
    q, k, v = (x.requires_grad_() for x in heads)
    return lambda: ops.hybrid_attention(q, k, v, layout, backend="triton"), [q, k, v]


def host_rows() -> list[Row]:
    """Return the host's cost of attention on tall and short tiles, forward and backward, in calls of F.linear."""
    x, weight = torch.zeros(1, 8), torch.zeros(8, 8)
    linear = _seconds(lambda: F.linear(x, weight), 100)
    found = []
    for make in (hybrid_attention, rotary_attention):
        forward, inputs = make(230, (200, 30))
        out = forward()
        upstream = torch.zeros_like(out)
        backward = partial(torch.autograd.grad, out, inputs, upstream, retain_graph=True)
        for name, call in (("forward", forward), ("backward", backward)):
            call()
            fake_driver.launches.clear()
            call()
            launches = fake_driver.launches.total()
            cost = _seconds(call, 5) / linear
            found.append({"op": make.__name__, "pass": name, "launches": launches, "linears": round(cost, 1)})
    return found


def _seconds(call: Callable[[], object], times: int) -> float:
    """Return the least seconds of a call: whatever else runs on the machine only adds to them."""
    return min(benchmark.Timer("call()", globals={"call": call}).timeit(times).mean for _ in range(400))


def compilations() -> dict[str, int]:
    """Return the binaries after a first batch, and how many more other batches and other lengths made."""
    counts = []
    batches = [2048] * 5, [2047, 2049, 1000, 3001, 4096]
    for totals in ([2048], *batches):
        for seed, T in enumerate(totals, start=len(counts)):
            lengths = [*mixes.generate("mixed", T - 300, seed)[0], 200, 30]  # both heights of tiles
            out = rotary_attention(T, lengths)[0]()
            out.backward(torch.zeros_like(out))
            x = torch.zeros(T, 512, dtype=torch.bfloat16, requires_grad=True)
            y, residual = ops.rms_norm(x, torch.ones(512, dtype=torch.bfloat16), 1e-5, backend="triton")
            (ops.swiglu(y, backend="triton").sum() + residual.sum()).backward()
        counts.append(fake_driver.compilations(attention_kernels, rms_norm, rope, swiglu).total())
    return {"first": counts[0], "other batches": counts[1] - counts[0], "other lengths": counts[2] - counts[1]}


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark that the command line asks for; return the exit code: 1 if other batches compile again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    parser.add_argument("--preset", choices=PRESETS, default="1.4b")
    parser.add_argument("--tokens", type=int, default=16384, help="of a micro-batch (default: 16384)")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    with fake_driver.fake_gpu():
        moved, host, binaries = byte_rows(PRESETS[options.preset], options.tokens), host_rows(), compilations()
    tables.write_csv(moved, options.out / "layer_bytes.csv")
    tables.write_csv(host, options.out / "layer_host.csv")
    kinds = ("pointwise", "matrix", "attention")
    total = {kind: sum(row["units"] for row in moved if row["kind"] == kind) for kind in kinds}
    tables.write_markdown(
        options.out / "layer_bench.md",
        f"# Bytes and launches of a layer, {options.preset}, {options.tokens:,} tokens",
        ", ".join(f"{kind} {units:.1f}" for kind, units in total.items())
        + f"; {sum(total.values()):.1f} units in all.",
        tables.markdown_table(moved, {n: f"{{{n}}}" for n in moved[0]}),
        _NOTE,
        tables.markdown_table(host, {n: f"{{{n}}}" for n in host[0]}),
        "Compilations: " + ", ".join(f"{name} {count}" for name, count in binaries.items()) + ".",
    )
    return 1 if binaries["other batches"] or binaries["other lengths"] else 0


_NOTE = """\
What an op does inside is not dispatched: on CUDA, torch up to 2.13 copies the residual before `addmm` adds to it, which
is 2 units more a call (pytorch issue 153590)."""


if __name__ == "__main__":
    sys.exit(main())
