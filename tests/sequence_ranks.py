"""Ranks that share packed batches, for the tests of sequence parallelism."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from launching import free_port
from small_models import laid_out, seeded, small_model
from torch import Tensor

from transfusion_fast.config import ModelConfig
from transfusion_fast.model.layers import Attention
from transfusion_fast.model.loss import Counts
from transfusion_fast.model.packed_batch import PackedBatch, build_batch
from transfusion_fast.model.sequence import Vocabulary
from transfusion_fast.model.sequence_parallel import split_batch

MODALITIES = (6, 3)
Result = dict[str, Tensor]


def cut_batch(copies: int = 0) -> PackedBatch:
    """Return 48 positions with padding. Two images of one modality lie in the halves, and one of the other in both.

    With noised copies there are 24 more positions for each.
    """
    vocabulary = Vocabulary(16, (2,) * len(MODALITIES))
    documents = [[[1, 2, 3], (0, 2, 6), [4, 5]], [(1, 2, 5), [6, 7], (0, 1, 2), [8]]]
    sequence = laid_out(documents, vocabulary)
    weights = np.repeat(np.array([0, 2, 1, 1, 0.5, 3, 1], np.float32), [4, 14, 3, 13, 2, 4, 2])  # by segment
    sequence = replace(sequence, weights=weights)
    images = [
        tuple(torch.randn(int(sequence.length[sequence.modality == m].sum()), width, generator=seeded(i))
              for i in (m, m + 9))
        for m, width in enumerate(MODALITIES)
    ]  # fmt: skip
    timesteps = torch.tensor([300.0, 700.0, 50.0])
    if copies:
        timesteps = torch.stack([timesteps + 10 * i for i in range(copies)])
        images = [(x, torch.stack([noise + i for i in range(copies)])) for x, noise in images]
    modalities = ModelConfig(dim_latent=MODALITIES, positions="axial").modalities
    return build_batch(sequence, images, timesteps, modalities, total_length=48 + 24 * copies)


def loss_and_gradients(settings: dict[str, Any], part: int, parts: int, group: str) -> Result:
    """Return this rank's part of the losses, and the gradients of its total, of the batch's losses per token.

    `noised_copies` among the settings is that of the batch.
    """
    copies, settings = settings.get("noised_copies", 0), {k: v for k, v in settings.items() if k != "noised_copies"}
    model = small_model(num_text_tokens=16, dim_latent=MODALITIES, positions="axial", **settings)
    for module in model.modules():
        if isinstance(module, Attention):
            module.sequence_group = group
    whole = cut_batch(copies)
    counts = Counts.of(whole)
    losses = model(split_batch(whole, part, parts) if parts > 1 else whole, counts=counts)
    losses.total.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"text": losses.text.detach(), "diffusion": losses.diffusion.detach(), **gradients}


def _rank(rank: int, ranks: int, port: str, cases: Sequence[dict[str, Any]], out: Path) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), WORLD_SIZE=str(ranks))
    dist.init_process_group("gloo")
    group = dist.group.WORLD.group_name
    results = [loss_and_gradients(settings, rank, ranks, group) for settings in cases]
    for result in results:
        for value in result.values():
            dist.all_reduce(value)
    if rank == 0:
        torch.save(results, out)
    dist.destroy_process_group()


def on_ranks(ranks: int, cases: Sequence[dict[str, Any]], folder: Path) -> list[Result]:
    """Return the sums over ranks that share the batch, for each of the model settings."""
    out = folder / "results"
    run_ranks(_rank, ranks, cases, out)
    return torch.load(out)


def run_ranks(function: Callable[..., None], ranks: int, *arguments: Any) -> None:
    """Call function(rank, ranks, port, *arguments) in a process for each rank, and assert that all end well."""
    context, port = multiprocessing.get_context("forkserver"), free_port()
    processes = [context.Process(target=function, args=(rank, ranks, port, *arguments)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        process.kill()
    assert [process.exitcode for process in processes] == [0] * ranks
