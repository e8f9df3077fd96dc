"""Floating point operations of training, and the rates at which devices can do them; together they give the MFU.

A multiply-add counts as two operations. What a step must compute counts, whatever the implementation computes: not
padding, not masked pairs of positions, not what activation checkpointing or an attention kernel recomputes (model FLOPs
utilization, PaLM, arXiv 2204.02311, appendix B). Left out as negligible: elementwise work, norms, and what is computed
for each image, the timestep MLP and the modulation of patches.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch

from transfusion_fast.config import ModelConfig
from transfusion_fast.model.codec import multiply_adds
from transfusion_fast.model.sequence import Vocabulary


def training_flops(
    model: ModelConfig,
    tokens: float,
    supervised: float,
    patches: Sequence[float],
    area: float,
    *,
    decoded: Sequence[float] | None = None,
    frozen_text: bool = False,
) -> float:
    """Return the operations of the forward and backward passes over some packs.

    A matrix takes part in three products for each row that it multiplies: the output, and the gradients of its input
    and of its weight. Attention is two products a query head over the visible pairs in forward (Q K^T, P V) and four in
    backward (dV, dP, dQ, dK); key/value heads that query heads share change nothing. PaLM counts all T^2 pairs.

    Args:
        tokens: positions of documents, without padding.
        supervised: positions that have a label, where alone the language head is computed.
        patches: image patches of each modality.
        area: visible (query, key) pairs, the sum of `AttentionLayout.area`.
        decoded: patches of each modality that are trained; default: all, as there are no noised copies.
        frozen_text: whether text's weights need no gradient; that of their input is needed, as text sees patches.
    """
    t = model.transformer
    attention_dim = t.num_heads * t.head_dim
    qkv_and_out = t.dim * (2 * attention_dim + 2 * t.num_kv_heads * t.head_dim)
    block = qkv_and_out + 3 * t.dim * t.hidden_dim
    vocabulary = Vocabulary.of(model).size
    codecs = 0.0
    for one, encoded, trained in zip(model.modalities, patches, decoded or patches, strict=True):
        encode, decode = multiply_adds(one, t.dim)
        codecs += encode * encoded + decode * trained
    head = t.dim * vocabulary * supervised
    matrices = t.depth * block * tokens + head + codecs
    qkv = t.dim * (attention_dim + 2 * t.num_kv_heads * t.head_dim)  # whose input in the first block needs none either
    frozen = (t.depth * block + qkv) * (tokens - sum(patches)) + head if frozen_text else 0
    return 6 * matrices - 2 * frozen + 12 * t.depth * attention_dim * area


@dataclass(frozen=True)
class Gpu:
    """The data sheet of a GPU: dense peaks in operations a second, without sparsity; bytes; bytes a second."""

    bf16: float
    tf32: float
    fp32: float
    memory: float
    link: float
    """Bandwidth to the other GPUs of its node, in each direction: NVLink, or PCIe where there is none."""


def _gpu(bf16: float, tf32: float, fp32: float, memory: float, link: float) -> Gpu:
    return Gpu(bf16 * 1e12, tf32 * 1e12, fp32 * 1e12, memory * 1e9, link * 1e9)


# Words of the names that CUDA gives, the more specific first. From NVIDIA's data sheets, whose tensor core rates are
# halved where they are stated with sparsity, and whose NVLink bandwidth counts both directions.
_GPUS = {
    "GB200": _gpu(2500, 1250, 80, 186, 900),
    "B200": _gpu(2250, 1125, 75, 180, 900),
    "GH200": _gpu(989.4, 494.7, 66.9, 96, 450),
    "H200 NVL": _gpu(835.5, 417.5, 60, 141, 450),
    "H200": _gpu(989.4, 494.7, 66.9, 141, 450),
    "H100 NVL": _gpu(835.5, 417.5, 60, 94, 300),
    "H100 PCIe": _gpu(756, 378, 51.2, 80, 64),
    "H100": _gpu(989.4, 494.7, 66.9, 80, 450),
    "A100 40GB": _gpu(312, 156, 19.5, 40, 300),
    "A100 PCIe": _gpu(312, 156, 19.5, 80, 32),
    "A100": _gpu(312, 156, 19.5, 80, 300),
    "L40S": _gpu(362.05, 183, 91.6, 48, 32),
    "L4": _gpu(121, 60, 30.3, 24, 32),
    "A10": _gpu(125, 62.5, 31.2, 24, 32),
}
GPU_NAMES = tuple(_GPUS)
"""Names of the GPUs whose data sheets are known."""


def find_gpu(name: str) -> Gpu | None:
    """Return the data sheet of a GPU by the name that CUDA gives it, or None; a MIG instance is none of them."""
    words = _words(name)
    return None if "mig" in words else next((gpu for key, gpu in _GPUS.items() if _words(key) <= words), None)


def _words(name: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", name.lower()))


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return the operations a second that a device can do in matrix products: bf16, or fp32 as torch computes it.

    Returns:
        the dense peak of a GPU by its data sheet, None for an unknown one; on a CPU the rate that this process reaches
        with its threads, measured once in about a third of a second.
    """
    if device.type != "cuda":
        return _matmul_rate(dtype)
    gpu = find_gpu(torch.cuda.get_device_name(device))
    return None if gpu is None else gpu_peak(gpu, dtype)


def gpu_peak(gpu: Gpu, dtype: torch.dtype) -> float:
    """Return a GPU's peak in matrix products of bf16, or of fp32 as torch computes them with its present settings."""
    if dtype != torch.float32:
        return gpu.bf16
    return gpu.fp32 if torch.get_float32_matmul_precision() == "highest" else gpu.tf32


@cache
def _matmul_rate(dtype: torch.dtype, size: int = 1024, seconds: float = 0.3) -> float:
    """Return the operations a second of the fastest of several products of square matrices."""
    x = torch.ones(size, size, dtype=dtype)
    begin, fastest = time.perf_counter(), float("inf")
    while time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        torch.mm(x, x)
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * size**3 / fastest
