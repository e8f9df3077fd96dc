"""Run one small kernel of each kind, forward and backward, and compare the results with the reference in fp64.

    python benchmarks/kernel_check.py [--dims 64 128] [--dtypes bf16 fp32] [--fake-gpu]

Needs torch, triton and numpy alone. Without a GPU the kernels run in Triton's interpreter if TRITON_INTERPRET=1, and
with --fake-gpu they are compiled and launched, except for the launch itself, and nothing is compared. Exit status 1
where an error is above its limit.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import triton
from torch import Tensor

from transfusion_fast.kernels import attention_kernels, diffusion_mse, launch, rms_norm, rope, swiglu
from transfusion_fast.kernels.layout import AttentionLayout
from transfusion_fast.model import ops

# Largest norm of the difference, by the norm of the reference. The interpreter truncates to bf16 instead of rounding.
LIMITS = {"bf16": 1.5e-2, "fp16": 2e-3, "fp32": 1e-5}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

Op = Callable[..., Tensor | tuple[Tensor, ...]]


def cases(device: str, dim: int) -> Iterator[tuple[str, Op, list[Tensor]]]:
    """Yield name, op and inputs in fp32. The layout has tall and short tiles, and full and partial blocks."""
    layout = AttentionLayout.from_spans([137, 3, 40, 1], [(0, 130), (137, 2), (146, 20)], 185, device)
    T, H, G, P = layout.total_length, 4, 2, 40
    draw = partial(torch.randn, generator=torch.Generator(device).manual_seed(0), device=device)
    q, k, v = draw(T, H + 2 * G, dim).split([H, G, G], dim=1)
    yield f"attention D={dim}", partial(ops.hybrid_attention, layout=layout), [q, k, v]
    copies = AttentionLayout.from_spans([110, 75], [(5, 30)], T, device, noised_copies=[(50, 30, 5), (80, 30, 35)])
    yield f"attention with copies D={dim}", partial(ops.hybrid_attention, layout=copies), [q, k, v]
    table = ops.rotary(torch.arange(T, device=device), dim)

    def normed_rope(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, backend: str) -> tuple[Tensor, Tensor]:
        return ops.rope(q, k, table, q_weight=q_weight, k_weight=k_weight, backend=backend)

    yield f"rope D={dim}", normed_rope, [q, k, 1 + 0.1 * draw(dim), 1 + 0.1 * draw(dim)]
    of_projection = partial(ops.rotary_attention, kv_heads=G, positions=table, layout=layout)
    yield f"rotary_attention D={dim}", of_projection, [draw(T, H + 2 * G, dim)]
    yield f"rms_norm E={dim}", partial(ops.rms_norm, eps=1e-5), [draw(T, dim), 1 + 0.1 * draw(dim)]
    yield f"swiglu F={dim}", ops.swiglu, [draw(T, 2 * dim)]
    target, offsets = draw(P, dim), torch.tensor([0, 1, 33, P], dtype=torch.int32, device=device)
    yield f"diffusion_mse C={dim}", partial(ops.diffusion_mse, target=target, image_offsets=offsets), [draw(P, dim)]


def results_of(op: Op, inputs: Sequence[Tensor], backend: str) -> list[Tensor]:
    """Return outputs and gradients."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    found = op(*leaves, backend=backend)
    outputs = (found,) if isinstance(found, Tensor) else found
    upstream = [torch.linspace(-1, 2, x.numel(), device=x.device).view(x.shape).to(x.dtype) for x in outputs]
    return [x.detach() for x in (*outputs, *torch.autograd.grad(outputs, leaves, upstream))]


def check(device: str, dims: Sequence[int], dtypes: Sequence[str], compare: bool) -> bool:
    """Run every case and print a line for each; return whether all errors are within their limits."""
    right = True
    for dtype in dtypes:
        for name, op, inputs in (case for dim in dims for case in cases(device, dim)):
            start = time.perf_counter()
            rounded = [x.to(DTYPES[dtype]) for x in inputs]
            got = results_of(op, rounded, "triton")
            seconds = time.perf_counter() - start
            if not compare:
                print(f"launched {name} {dtype} ({seconds:.1f} s)", flush=True)
                continue
            exact = results_of(op, [x.double() for x in rounded], "reference")
            error = max(float((a.double() - b).norm() / b.norm()) for a, b in zip(got, exact, strict=True))
            verdict = "ok" if error <= LIMITS[dtype] else "WRONG"  # NaN is wrong
            right &= verdict == "ok"
            print(f"{verdict}: {name} {dtype}: error {error:.1e} of {LIMITS[dtype]:.1e} ({seconds:.1f} s)", flush=True)
    return right


def main(arguments: list[str] | None = None) -> int:
    """Run the check that the command line asks for; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16", "fp32"])
    parser.add_argument("--fake-gpu", action="store_true", help="compile and launch without a GPU, compare nothing")
    options = parser.parse_args(arguments)
    print(f"torch {torch.__version__}, triton {triton.__version__}, Python {sys.version.split()[0]}")
    if options.fake_gpu:
        from fake_driver import compilations, fake_gpu

        start = time.perf_counter()
        with fake_gpu():
            check("cpu", options.dims, options.dtypes, compare=False)
        count = sum(compilations(attention_kernels, diffusion_mse, rms_norm, rope, swiglu).values())
        print(f"{count} compilations, {(time.perf_counter() - start) / count:.2f} s each")
        return 0
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        print(
            f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, sm_{launch.architecture(torch.device('cuda'))}"
        )
    return 0 if check(device, options.dims, options.dtypes, compare=True) else 1


if __name__ == "__main__":
    sys.exit(main())
