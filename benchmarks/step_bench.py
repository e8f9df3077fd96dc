"""Time whole training steps: forward, backward and AdamW, with the fused ops and with plain PyTorch.

    python benchmarks/step_bench.py --out DIR [--preset mini|0.16b|..] [--device cuda|cpu] [--peer transfusion-pytorch]

Writes DIR/step.csv, step.md and step.png. Before anything is timed, the losses of all rows must be equal to 1e-5 in
fp32, including the compiled ones. In bf16 the weights are bf16 and the optimizer keeps them in fp32, as the trainer
does. "plain" is the same model as one would write it: the ops one by one, and one scaled_dot_product_attention under a
dense mask that is made once a step. The yardstick of the steps is the machine's rate in the matrix products of a linear
layer, forward and backward. On a CPU all of these take turns, each right after an untimed one of its kind. `BLOCKS`
are models of the same sizes with other blocks; separate weights may take `BOUND` times the time of shared ones.
"""

import argparse
import gc
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import accumulate, pairwise
from math import prod
from typing import NamedTuple
from unittest.mock import patch

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"  # before triton is imported, so that kernels are compiled
    # Compilation is measured, and a cache from an earlier run would hide it.
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"

import mixes
import tables
import timing
import torch
import torch.nn.functional as F
from gate import OUT_OF_MEMORY, failure_reason
from tables import Row
from timing import Step, Times, allocated_bytes
from torch import Tensor, nn
from torch.utils import benchmark

from transfusion_fast import Transfusion
from transfusion_fast.config import PRESETS, ModelConfig, TransformerConfig
from transfusion_fast.errors import InputError
from transfusion_fast.kernels.layout import AttentionLayout
from transfusion_fast.model import inputs
from transfusion_fast.model.loss import Losses
from transfusion_fast.model.ops import IMPLEMENTATIONS
from transfusion_fast.model.packed_batch import PackedBatch

DTYPES = {name: timing.DTYPES[name] for name in ("bf16", "fp32")}
TEXT_TOKENS, CHANNELS = 256, 16
PATCHES = 64  # of an image of the ragged documents: 8 x 8
RAGGED_PRESET = "mini"  # made for CPUs; the other presets are sizes of the paper
TRANSFORMERS = {RAGGED_PRESET: TransformerConfig(dim=256, depth=6, heads=8), **PRESETS}
MATMUL = (1424, 256, 1024)  # positions, inputs, outputs of the linear layer that the machine's rate is measured with
EQUAL = 1e-5  # of the losses in fp32
CHECKED = 1024  # positions of which losses are compared: of many more, attention over all pairs keeps too much memory
PEER = "transfusion-pytorch"
PLAIN = "plain"
SHARED, SEPARATE, BOUND = "", "separate weights", 1.15
BLOCKS = {SHARED: {}, SEPARATE: {"modality_weights": "separate"}, "adaLN-zero": {"conditioning": "adaln"}}
_MATMULS = 10

# Documents as a model takes them: integers are text, [patches, C] numbers an image.
Documents = list[list[Tensor]]


class Variant(NamedTuple):
    """One way to run the model."""

    dtype: str
    backend: str
    compiled: bool = False
    checkpointing: str = "none"
    blocks: str = SHARED

    def __str__(self) -> str:
        compiled = ", compiled" if self.compiled else ""
        kept = "" if self.checkpointing == "none" else f", {self.checkpointing} checkpointing"
        return f"{self.dtype} {self.backend}{compiled}{kept}{self.blocks and f', {self.blocks}'}"


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark that the command line asks for; return the exit code."""
    parser = timing.make_parser(__doc__)
    parser.add_argument("--preset", choices=TRANSFORMERS, help="default: mini on a CPU, 0.37b on cuda")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--peer", choices=(PEER,), help="time this package too, if it is installed")
    parser.add_argument("--seconds", type=float, default=20, help="to time each step for (default: 20)")
    options = parser.parse_args(arguments)
    return timing.run_benchmark("step_bench", options, partial(_measure, options))


def _measure(options: argparse.Namespace, device: torch.device) -> bool:
    cpu = device.type == "cpu"
    preset, ours = options.preset or (RAGGED_PRESET if cpu else "0.37b"), "torch" if cpu else "triton"
    documents = ragged_documents() if preset == RAGGED_PRESET else mix_documents("mixed", mixes.FIXED_LENGTH)
    if cpu and importlib.util.find_spec("deepspeed"):  # as training does
        from transfusion_fast.training.ranks import keep_freed_memory

        keep_freed_memory()
    check_losses(preset, documents, device, ours)
    makers = {
        str(variant): partial(_prepare, variant) for dtype in options.dtypes for variant in variants(dtype, ours)
    } | ({PEER: prepare_peer} if options.peer else {})
    prepared, timings = {}, {}
    for name, make in makers.items():
        with _out_of_memory_in(prepared, name):
            step, facts = make(preset, documents, device)
            facts |= {"preset": preset, "peak_bytes": allocated_bytes(lambda step=step: step()(), device)[1]}
            if not cpu:  # each step has the memory to itself; on a CPU they take turns
                timings |= timing.time_steps({name: step}, device, options.seconds)
            prepared[name] = (step if cpu else None), facts
        step = None
    steps = {name: step for name, (step, _) in prepared.items() if step}
    timings |= timing.time_steps(steps | _matmuls(device), device, options.seconds, rehearse=True)
    rates = {dtype: _MATMULS * 6 * prod(MATMUL) / timing.both_ms(timings[dtype]) / 1e6 for dtype in DTYPES}
    machine = timing.describe_machine(device)
    rows = [
        make_row(facts, timings[name], rates, machine) if name in timings else facts | {"op": "step", **machine}
        for name, (_, facts) in prepared.items()
    ]
    bounds = "\n".join(compare_blocks(rows, dtype, ours) for dtype in options.dtypes)
    tables.draw(rows, options.out / "step.png", "{name}", "{preset}", {"tokens a second": "tokens_per_s"})
    tokens = make_batch(make_model(preset, Variant("bf16", ours), torch.device("cpu")), documents).num_tokens
    about = f"Preset {preset}, {tokens:,} tokens a step: forward, backward and AdamW. {NOTES.format(*MATMUL)}"
    unmeasured = "\n".join(f"- {row['name']}: {row['status']}" for row in rows if "status" in row)
    tables.write_report(options.out / "step", "Whole training steps", rows, COLUMNS, about, bounds, unmeasured)
    return True


@contextmanager
def _out_of_memory_in(prepared: dict[str, tuple[Step | None, Row]], name: str) -> Iterator[None]:
    """Make running out of memory the result of a step."""
    try:
        yield
    except RuntimeError as error:
        if failure_reason(error) != OUT_OF_MEMORY:
            raise
        prepared[name] = None, {"name": name, "status": f"{timing.NOT_MEASURED}: {OUT_OF_MEMORY}"}


def variants(dtype: str, ours: str) -> list[Variant]:
    """Return plain PyTorch, then ours."""
    settings = [Variant(dtype, ours, checkpointing=c) for c in ("none", "selective", "full")]
    blocks = [Variant(dtype, ours, blocks=name) for name in BLOCKS if name != SHARED]
    return [Variant(dtype, PLAIN), *settings, Variant(dtype, ours, compiled=True), *blocks]


def compare_blocks(rows: list[Row], dtype: str, ours: str) -> str:
    """Add `times_shared` to the rows of `BLOCKS`, and return whether separate weights are within `BOUND`."""
    measured = {row["name"]: row for row in rows if "status" not in row}
    found = {blocks: measured.get(str(Variant(dtype, ours, blocks=blocks))) for blocks in BLOCKS}
    for row in filter(None, found.values()):
        row["times_shared"] = found[SHARED] and found[SHARED]["tokens_per_s"] / row["tokens_per_s"]
    ratio = (found[SEPARATE] or {}).get("times_shared")
    outcome = timing.NOT_MEASURED if ratio is None else f"{ratio:.3f}, {'pass' if ratio <= BOUND else 'fail'}"
    return f"- {dtype}: separate weights take at most {BOUND} times the step of shared weights: {outcome}"


def ragged_documents(count: int = 24) -> Documents:
    """Return documents of 4 to 160 text tokens; every other one ends in an image of 8 x 8 patches."""
    generator = torch.Generator().manual_seed(0)
    documents: Documents = []
    for number in range(count):
        length = int(torch.randint(4, 161, (), generator=generator))
        text = torch.randint(0, TEXT_TOKENS, (length,), generator=generator)
        documents.append([text, torch.randn(PATCHES, CHANNELS, generator=generator)] if number % 2 == 0 else [text])
    return documents


def mix_documents(mix: str, length: int) -> Documents:
    """Return the documents of a mix; each end of a run of text gives its position to a special token."""
    generator = torch.Generator().manual_seed(0)
    documents: Documents = []
    for start, end, document_start, is_image in mixes.segments(mixes.sample(mix, length)):
        if start == document_start:
            documents.append([])
        if is_image:
            documents[-1].append(torch.randn(end - start, CHANNELS, generator=generator))
        elif end - start > 2:
            documents[-1].append(torch.randint(0, TEXT_TOKENS, (end - start - 2,), generator=generator))
    return documents


def make_batch(model: Transfusion, documents: Documents) -> PackedBatch:
    """Return one micro-batch of the documents, with the same noise and timesteps each time."""
    randomness = inputs.Randomness(torch.Generator().manual_seed(0), prob_uncond=0)
    return inputs.pack_documents(documents, model.config, randomness)


def make_model(preset: str, variant: Variant, device: torch.device) -> Transfusion:
    """Return the model of a preset, with the same weights each time."""
    torch.manual_seed(0)
    backend = "reference" if variant.backend == PLAIN else variant.backend
    settings = {"backend": backend, "activation_checkpointing": variant.checkpointing}
    transformer = TransformerConfig(**vars(TRANSFORMERS[preset]) | BLOCKS[variant.blocks])
    sizes = {"num_text_tokens": TEXT_TOKENS, "dim_latent": (CHANNELS,), "transformer": transformer}
    model = Transfusion(ModelConfig(**sizes, **settings)).to(device, DTYPES[variant.dtype])
    if variant.compiled:
        torch.compiler.reset()  # so that the blocks are compiled for one shape
        for block in model.blocks:
            block.compile(dynamic=False)
    return model


def _forward(model: Transfusion, variant: Variant, batch: PackedBatch) -> Losses:
    if variant.backend != PLAIN:
        return model(batch)
    with patch.dict(IMPLEMENTATIONS["reference"], hybrid_attention=_plain_attention):
        return model(batch)


def _plain_attention(q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout, scale: float | None) -> Tensor:
    """Compute one scaled_dot_product_attention under a dense mask that all layers share."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # without a batch, torch takes no fused kernel
    return F.scaled_dot_product_attention(q, k, v, attn_mask=_mask(layout), scale=scale)[0].transpose(0, 1)


@lru_cache(maxsize=1)
def _mask(layout: AttentionLayout) -> Tensor:
    mask = layout.dense_mask()
    return mask | ~mask.any(dim=-1, keepdim=True)  # padding must see something, or its softmax is NaN


def check_losses(preset: str, documents: Documents, device: torch.device, ours: str) -> None:
    """Raise InputError unless every way to run the model gives the reference's losses in fp32."""
    backends = dict.fromkeys(["reference", ours, "torch", PLAIN])
    ends = accumulate(sum(map(len, document)) for document in documents)
    few = [document for document, end in zip(documents, ends, strict=True) if end <= CHECKED] or documents[:1]
    losses, compiled = {}, Variant("fp32", ours, compiled=True)
    for variant in [*(Variant("fp32", one, blocks=blocks) for blocks in BLOCKS for one in backends), compiled]:
        model = make_model(preset, variant, device)
        found = _forward(model, variant, make_batch(model, few).to(device))
        losses[variant] = torch.stack([found.text, found.diffusion]).detach()
    for variant, found in losses.items():
        expected = losses[Variant("fp32", "reference", blocks=variant.blocks)]
        difference = (found - expected).abs().max() / expected.abs().max()
        if not difference <= EQUAL:
            raise InputError(f"losses of {variant} must be the reference's to {EQUAL}, they differ by {difference:.2e}")


def model_flops(model: Transfusion, batch: PackedBatch) -> int:
    """Return the FLOPs of forward and backward: 6 for each use of a matrix's weight, 12 H D a layer for a visible pair.

    Recomputation is not counted, nor are embeddings, norms and the few vectors of timesteps.
    """
    transformer = model.config.transformer
    uses = len(batch.tokens) * sum(p.numel() for p in model.blocks.parameters() if p.ndim == 2)
    uses += len(batch.supervised) * model.head.weight.numel()
    uses += sum(2 * len(m.latents) * m.latents.shape[1] * transformer.dim for m in batch.modalities)
    return 6 * uses + 12 * transformer.depth * transformer.dim * batch.layout.area


def train_step(model: nn.Module, loss: Callable[[], Tensor]) -> Step:
    """Return the step whose backward pass includes AdamW, which keeps half-precision weights in fp32."""
    weights = list(model.parameters())
    half = weights[0].dtype != torch.float32
    masters = [p.detach().float().requires_grad_() for p in weights] if half else weights
    optimizer = torch.optim.AdamW(masters, lr=1e-5, fused=True)

    def step() -> Callable[[], None]:
        value = loss()

        def finish() -> None:
            value.backward()
            if half:
                for master, weight in zip(masters, weights, strict=True):
                    master.grad = None if weight.grad is None else weight.grad.float()
            optimizer.step()
            if half:
                torch._foreach_copy_([p.data for p in weights], masters)
            model.zero_grad()

        return finish

    return step


def _prepare(variant: Variant, preset: str, documents: Documents, device: torch.device) -> tuple[Step, Row]:
    """Return a step that is ready to be timed, and what is known about it before."""
    print(f"{variant}: preparing", file=sys.stderr)
    model = make_model(preset, variant, device)
    batch = make_batch(model, documents).to(device)
    step = train_step(model, lambda: _forward(model, variant, batch).total)
    times = [benchmark.timer()]
    for _ in range(2):
        step()()
        times.append(benchmark.timer())
    first, second = (end - start for start, end in pairwise(times))
    shared = make_model(preset, variant._replace(compiled=False, blocks=SHARED), torch.device("meta"))
    return step, {
        "name": str(variant), "dtype": variant.dtype, "parameters": _count(model), "active": _count(shared),
        "tokens": batch.num_tokens, "flops": model_flops(shared, batch),
        "compile_s": first - second if variant.compiled else None,
        "kept_bytes": None if variant.compiled else kept_bytes(lambda: _forward(model, variant, batch).total, device),
    }  # fmt: skip


def kept_bytes(forward: Callable[[], Tensor], device: torch.device) -> int:
    """Return the bytes that `forward` allocates and that live as long as its result: what backward needs."""
    gc.collect()  # frees what only cycles of references keep alive
    return allocated_bytes(lambda: [forward(), gc.collect()], device)[0]


def prepare_peer(preset: str, documents: Documents, device: torch.device) -> tuple[Step, Row]:
    """Prepare the other package's model in fp32: our width and heads, and the depth with the closest parameter count.

    Raises:
        InputError: the package is not installed.
    """
    try:
        from transfusion_pytorch import Transfusion as Peer
    except ImportError as error:
        raise InputError(f"--peer {PEER} needs that package: {error}; install it, or leave --peer out") from error
    config = TRANSFORMERS[preset]
    ours = make_model(preset, Variant("fp32", "torch"), torch.device("cpu"))

    def build(depth: int) -> nn.Module:
        torch.manual_seed(0)
        transformer = {"dim": config.dim, "depth": depth, "heads": config.num_heads, "dim_head": config.head_dim}
        sizes = {"num_text_tokens": TEXT_TOKENS, "dim_latent": CHANNELS, "modality_default_shape": (PATCHES,)}
        return Peer(**sizes, transformer=transformer)

    depth = min(range(1, config.depth + 1), key=lambda d: abs(_count(build(d)) - _count(ours)))
    model = build(depth).to(device)
    moved = [[piece.to(device) for piece in document] for document in documents]
    return train_step(model, lambda: model(moved)), {
        "name": f"fp32 {PEER}, depth {depth}", "dtype": "fp32", "parameters": _count(model), "active": _count(model),
        "tokens": make_batch(ours, documents).num_tokens, "flops": None, "compile_s": None, "kept_bytes": None,
    }  # fmt: skip


def _matmuls(device: torch.device) -> dict[str, Step]:
    """Return the matrix products of one linear layer, forward and backward, `_MATMULS` times each, by dtype."""
    T, K, N = MATMUL

    def repeat(products: Callable[[], object]) -> None:
        for _ in range(_MATMULS):
            products()

    def step(a: Tensor, b: Tensor, g: Tensor) -> Callable[[], None]:
        repeat(lambda: a @ b.t())
        return lambda: repeat(lambda: (g @ b, g.t() @ a))

    shapes = (T, K), (N, K), (T, N)
    return {
        name: partial(step, *(torch.randn(shape, device=device, dtype=dtype) for shape in shapes))
        for name, dtype in DTYPES.items()
    }


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def make_row(facts: Row, times: Times, rates: Mapping[str, float], machine: Mapping[str, str]) -> Row:
    """Return the row of a step, with None for what was not measured or does not apply.

    `backward` includes the optimizer; `weight_gflops` are 6 FLOPs a token and active parameter; `mfu` counts
    exactly. `rates` are the GFLOP/s of matrix products, by dtype.
    """
    seconds, tokens, dtype = timing.both_ms(times) / 1e3, facts["tokens"], facts["dtype"]
    weight_gflops = 6 * facts["active"] * tokens / seconds / 1e9
    peak_tflops, _ = timing.peaks_of(machine["hardware"])
    peak_gflops = peak_tflops * 1e3 if peak_tflops and dtype != "fp32" else rates[dtype]
    flops, kept = facts["flops"], facts["kept_bytes"]
    return {
        "op": "step", **{name: facts[name] for name in ("name", "preset", "dtype", "parameters", "tokens")},
        **{f"{column}_ms": ms for column, ms in times.items()}, "tokens_per_s": tokens / seconds,
        "weight_gflops": weight_gflops,
        "matmul_gflops": rates[dtype], "share_of_matmul": weight_gflops / rates[dtype],
        "share_of_fp32_matmul": weight_gflops / rates["fp32"],
        "mfu": None if flops is None else flops / seconds / 1e9 / peak_gflops,
        "peak_mib": facts["peak_bytes"] / 2**20, "kept_bytes_per_token": None if kept is None else kept / tokens,
        "compile_s": facts["compile_s"], "times_shared": None, **machine,
    }  # fmt: skip


COLUMNS = {
    "step": "{name}", "parameters": "{parameters:,}", "forward ms": tables.spread("forward", ".0f", "_ms"),
    "backward and optimizer ms": tables.spread("backward", ".0f", "_ms"), "tokens/s": "{tokens_per_s:,.0f}",
    "of the matmul rate in its dtype": "{share_of_matmul:.1%}", "of the fp32 matmul rate": "{share_of_fp32_matmul:.2f}",
    "MFU": "{mfu:.1%}", "peak MiB": "{peak_mib:,.0f}",
    "kept for backward, bytes a token": "{kept_bytes_per_token:,.0f}", "compilation s": "{compile_s:.1f}",
    "times shared weights": "{times_shared:.3f}",
}  # fmt: skip
NOTES = """\
Losses of all rows were equal to 1e-5 in fp32 before anything was timed, to those of the same blocks in plain PyTorch.
Times are medians (20th to 80th percentile); a dash stands for what was not measured. The matmul rate is that of a
linear layer, forward and backward, at [{0}, {1}] x [{1}, {2}] in the same run; a step's is 6 FLOPs a token and active
parameter. MFU counts each use of a weight and each visible pair, as a share of the GPU's peak or, where that is
unknown, of the matmul rate. Peak memory is what a step takes beyond weights and the optimizer's state. Compilation
starts without a cache; the first row that compiles also pays for starting the compiler."""


if __name__ == "__main__":
    sys.exit(main())
