"""Time decoding over the cache against running whole sequences, and against transfusion-pytorch if it is installed.

    python benchmarks/sampling_bench.py --out DIR [--seconds 5]

Writes DIR/sampling.csv and sampling.md. The ways of a task take turns in one run.
"""

import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import tables
import timing
import torch
import torch.nn.functional as F
from tables import Row

from transfusion_fast import ImageSettings, Transfusion
from transfusion_fast.sampling.cache import KeyValueCache
from transfusion_fast.sampling.decoder import generate_images
from transfusion_fast.sampling.engine import Context, Engine

WIDTH, DEPTH, HEADS, PATCH = 256, 6, 4, 8
CONTEXT, PROMPT, SIDE, DIGITS = 1024, 4096, 16, 64
TOKENS = 16  # decoded by each timed call, so that what a call prepares counts little
_PEER = "transfusion-pytorch"

Ways = Mapping[str, Callable[[], object]]


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit code."""
    parser = timing.make_parser(__doc__)
    parser.add_argument("--seconds", type=float, default=5, help="to time each way for (default: %(default)s)")
    options = parser.parse_args(arguments)

    @torch.no_grad()
    def measure(device: torch.device) -> bool:
        torch.manual_seed(0)
        transformer = {"dim": WIDTH, "depth": DEPTH, "heads": HEADS}
        with device:
            model = Transfusion(num_text_tokens=256, dim_latent=PATCH, transformer=transformer).eval()
        rows = [
            *time_task(f"a token of text after {CONTEXT:,}", text_ways(model), TOKENS, device, options.seconds),
            *time_task(f"{DIGITS} guided digits of 16 patches", digit_ways(model), DIGITS, device, options.seconds),
            *time_task(f"a step of an image after {PROMPT:,} tokens", image_ways(model), 1, device, options.seconds),
        ]
        tables.write_report(options.out / "sampling", "Decoding", rows, COLUMNS, NOTES)
        return True

    return timing.run_benchmark("sampling_bench", options, measure)


def text_ways(model: Transfusion) -> Ways:
    """Return ways to decode `TOKENS` ids greedily after a context."""
    engine, ids = Engine(model), torch.randint(0, 256, (CONTEXT,)).tolist()
    begun, _ = engine.prefill([Context(ids)])
    begun.reserve(CONTEXT + TOKENS)

    def cached() -> None:
        begun.lengths, begun.next_position = [CONTEXT], [CONTEXT]
        token = 0
        for _ in range(TOKENS):
            token = int(model.head(engine.step(begun, [0], [token])).argmax())

    def whole() -> None:
        context = Context(list(ids))
        for _ in range(TOKENS):
            context.tokens.append(int(model.head(engine.prefill([context])[1]).argmax()))

    least = {"its products and attention": products_and_attention(model, begun)}
    return {"cache": cached, "whole sequences": whole, **least, **peer_text(ids, model.device)}


def products_and_attention(model: Transfusion, cache: KeyValueCache) -> Callable[[], None]:
    """Return the matrix products and the attention of tokens after a context, without any other op."""
    parts = [(b.attention.qkv, b.attention.out, b.mlp.gate_up, b.mlp.down) for b in model.blocks]
    weights = [[layer.weight for layer in layers] for layers in parts]
    inputs = [[torch.randn(1, weight.shape[1], device=model.device) for weight in own] for own in weights]
    seen = [[x[:, :CONTEXT].transpose(1, 2) for x in pair] for pair in zip(cache.keys, cache.values, strict=True)]
    query = torch.randn(1, HEADS, 1, WIDTH // HEADS, device=model.device)

    def run() -> None:
        for _ in range(TOKENS):
            for own, given, (keys, values) in zip(weights, inputs, seen, strict=True):
                F.scaled_dot_product_attention(query, keys, values)
                for weight, x in zip(own, given, strict=True):
                    F.linear(x, weight)

    return run


def peer_text(ids: list[int], device: torch.device) -> Ways:
    """Return the same with transfusion-pytorch and its cache; nothing if it is not installed."""
    try:
        from transfusion_pytorch import Transfusion as Peer
    except ImportError:
        return {}
    transformer = {"dim": WIDTH, "depth": DEPTH, "heads": HEADS, "dim_head": WIDTH // HEADS}
    peer = Peer(num_text_tokens=256, dim_latent=PATCH, transformer=transformer).to(device).eval()
    prompt = torch.tensor([ids], device=device)
    first, begun = peer.forward_text(prompt, return_loss=False, return_kv_cache=True)

    def cached() -> None:
        cache, token = begun, first[:, -1].argmax(-1, keepdim=True)
        for _ in range(TOKENS):
            logits, cache = peer.forward_text(token, return_loss=False, return_kv_cache=True, cache=cache)
            token = logits[:, -1].argmax(-1, keepdim=True)

    return {f"{_PEER}, its cache": cached}


def digit_ways(model: Transfusion) -> Ways:
    """Return ways to draw small images with guidance, after prompts of 3 to 5 bytes."""
    prompts = [[torch.randint(0, 256, (3 + n % 3,))] for n in range(DIGITS)]
    settings = ImageSettings(steps=4, clip=1.0)
    draw = partial(generate_images, model, grid=(4, 4), image=settings)
    return {
        "together": lambda: draw(prompts),
        "one by one": lambda: [draw([prompt], prompt_numbers=[number]) for number, prompt in enumerate(prompts)],
    }


def image_ways(model: Transfusion) -> Ways:
    """Return ways to predict an image of 256 patches once."""
    engine, ids = Engine(model), torch.randint(0, 256, (PROMPT,)).tolist()
    begun = Context([*ids, model.vocabulary.boi()])
    drawing = engine.start_image([(engine.prefill([begun])[0], [0])], 0, (SIDE, SIDE))
    x = torch.randn(1, SIDE, SIDE, PATCH, device=model.device)
    whole = Context(list(begun.tokens))
    whole.append_image(0, x[0])
    return {"cache": lambda: drawing.predict(x, 500.0), "whole sequences": lambda: engine.prefill([whole])}


def time_task(task: str, ways: Ways, count: int, device: torch.device, seconds: float) -> list[Row]:
    """Time the ways of a task, which does `count` things; the first way is the reference of the ratios."""

    def step_of(way: Callable[[], object]) -> Callable[[], None]:
        way()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return lambda: None

    timings = timing.time_steps({name: partial(step_of, way) for name, way in ways.items()}, device, seconds)
    rows: list[dict[str, Any]] = []
    for name, times in timings.items():
        p20, p50, p80 = (times[f"forward_{quantile}"] / count for quantile in ("p20", "p50", "p80"))
        slower = p50 / rows[0]["p50_ms"] if rows else 1.0
        rows.append({
            "task": task, "way": name, "p20_ms": p20, "p50_ms": p50, "p80_ms": p80, "per_s": 1e3 / p50,
            "times_the_first": slower, **timing.describe_machine(device),
        })  # fmt: skip
    return rows


COLUMNS = {
    "each": "{task}", "way": "{way}", "ms": "{p50_ms:,.2f} ({p20_ms:,.2f}-{p80_ms:,.2f})", "per second": "{per_s:,.1f}",
    "time over the first way's": "{times_the_first:,.2f}",
}  # fmt: skip
NOTES = f"""\
Times are medians (20th to 80th percentile) in fp32. The model has width {WIDTH}, depth {DEPTH} and {HEADS} heads of
{WIDTH // HEADS}. Whole sequences are run again for each token or step, by the pass that fills the cache. Digits take 4
diffusion steps; their times are per digit. The products and attention are those of one row in the blocks, without any
other op. {_PEER} is measured where it is installed."""


if __name__ == "__main__":
    sys.exit(main())
