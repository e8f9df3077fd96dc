"""Times the mean squared error of each image, against a target and against one made of noise, with plain PyTorch.

    python benchmarks/diffusion_mse_bench.py --out DIR [--device cuda|cpu] [--dtypes bf16 ..] [--backends ..]

Writes DIR/diffusion_mse.csv, diffusion_mse.md and diffusion_mse.png. Patches have 32 numbers (2 x 2 of 8 latent
channels); images are of 256 patches, or of 1 to 1,024. As in training, what the model predicts has the dtype of the row
and the rest is fp32. Exit status 1 where a backend computed something wrong, or one of ours broke.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial

if __name__ == "__main__":
    # Before triton is imported: kernels are compiled here, whatever the shell says.
    os.environ["TRITON_INTERPRET"] = "0"

import fused_bench
import torch
from fused_bench import Where
from fused_compare import Forward, Problem, bytes_of
from torch import Tensor

from transfusion_fast.kernels import reference
from transfusion_fast.model import ops

C = 32


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark that the command line asks for; returns the exit code."""
    problems = [partial(error, ragged=ragged, flow=flow) for ragged in (False, True) for flow in (False, True)]
    return fused_bench.main("diffusion_mse", "Squared error of each image", __doc__, problems, arguments)


def error(where: Where, ragged: bool, flow: bool) -> Problem:
    """`flow`: the target is noise less latents; else it is there already."""
    count = 4 if where.tiny else 512 if where.device.type == "cuda" else 64
    lengths = torch.full((count,), 256)
    if ragged:
        lengths = torch.randint(1, 1025, (count,), generator=torch.Generator().manual_seed(0))
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int().to(where.device)
    P = int(lengths.sum())
    prediction = where.normal(0, P, C)
    eps, x_0 = where.normal(1, 2, P, C, dtype=torch.float32)
    targets = (eps, x_0) if flow else (eps,)
    read = bytes_of(prediction, *targets, offsets) + 4 * count

    def target(dtype: torch.dtype) -> Tensor:
        return eps.to(dtype) - x_0.to(dtype) if flow else eps.to(dtype)

    return Problem(
        op="diffusion_mse from noise" if flow else "diffusion_mse",
        shape=f"{count} images of {'1 to 1024' if ragged else 256} patches, P={P}",
        inputs=(prediction.requires_grad_(),),
        specification=lambda p: reference.diffusion_mse(p, target(p.dtype), offsets),
        ours=lambda backend: _ours(backend, eps, x_0 if flow else None, offsets),
        plain=_plain(eps, x_0 if flow else None, lengths.to(where.device)),
        least=(read, read + bytes_of(prediction)),
    )


def _ours(backend: str, eps: Tensor, x_0: Tensor | None, offsets: Tensor) -> Forward:
    if x_0 is None:
        return lambda p: ops.diffusion_mse(p, eps, offsets, backend=backend)
    return lambda p: ops.diffusion_mse_from_noise(p, x_0, eps, offsets, "flow", backend=backend)


def _plain(eps: Tensor, x_0: Tensor | None, lengths: Tensor) -> Callable[[Tensor], Tensor]:
    """Adds the errors of patches up by image."""
    images = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)

    def plain(prediction: Tensor) -> Tensor:
        target = eps if x_0 is None else eps - x_0
        squared = (prediction.float() - target).square().mean(dim=-1)
        return squared.new_zeros(len(lengths)).index_add(0, images, squared) / lengths

    return plain


if __name__ == "__main__":
    sys.exit(main())
