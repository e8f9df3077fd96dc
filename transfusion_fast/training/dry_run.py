"""The report of `train/pretrain.py --dry-run`: settings, checks of data and output, and an estimate."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from transfusion_fast.config import Config
from transfusion_fast.data.folder import LocalFolder
from transfusion_fast.data.loader import BatchSplit, open_heldout
from transfusion_fast.data.mixture import Mixture
from transfusion_fast.errors import InputError
from transfusion_fast.training.checkpoint_files import META, find_damage, list_checkpoints, read_meta
from transfusion_fast.training.estimate import Cluster, Estimate, estimate, read_packs
from transfusion_fast.training.initialize import open_initial_weights
from transfusion_fast.training.resume import check_same_run, initial_meta, resume_notes
from transfusion_fast.training.run_folder import check_output

_DAY = 86400
_USES = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer: fp32 weights and its state",
    "ema": "average of the weights (EMA)",
    "buffers": "gathered weights and reduce buckets",
}


def dry_run(
    config: Config, data: Mixture, cluster: Cluster, packs: int, settings: Iterable[tuple[str, Any, str]]
) -> str:
    """Check what a run reads and where it writes, and return a report with what it would need. Writes nothing.

    Args:
        packs: number of packs to read.
        settings: name, value and source of each setting, from `config.sources`.

    Raises:
        InputError: training would refuse the data, the output folder, the settings of the run in it, or the batch on
            this number of GPUs.
    """
    if packs < 1:
        raise InputError(f"--packs must be at least 1, got {packs}; correct it")
    folder, train = _check_output(Path(config.train.output)), config.train
    split = BatchSplit(0, cluster.gpus, train.micro_batch, train.global_batch, train.sequence_parallel)
    if config.deepspeed:
        from transfusion_fast.training.engine import deepspeed_settings  # importing DeepSpeed takes seconds

        deepspeed_settings(config, split, bf16=train.precision != "fp32", cuda=True)
    run = estimate(config, data, cluster, read_packs(config, data, packs))
    lines = [
        "An estimate on paper: nothing was trained, and only the loader's time was measured.",
        *_settings(settings),
        *_checks(config, data, run, folder),
        *_parameters(config, run),
        *_memory(config, cluster, run),
        *_work(config, data, cluster, run),
        *_step(config, cluster, run),
        *_assumptions(cluster, run),
    ]
    return "\n".join(lines)


def _check_output(run: Path) -> Path:
    """Return the existing folder that would hold the run's files, after checking what training checks."""
    check_output(run)
    existing = next(folder for folder in (run, *run.absolute().parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise InputError(f"train.output must be writable, got {run}, where {existing} is not; give another")
    return existing


def _settings(settings: Iterable[tuple[str, Any, str]]) -> Iterator[str]:
    yield "\nSETTINGS, and where each value comes from"
    for name, value, source in settings:
        yield f"  {name:<32} {_short(value):<32} {source}"


def _checks(config: Config, data: Mixture, run: Estimate, folder: Path) -> Iterator[str]:
    shards = sum(len(d.index.shards) for d in data.datasets if isinstance(d.folder, LocalFolder))
    yield "\nCHECKS (passed)"
    yield f"  data    {data}: index readable, {data.num_packs:,} packs of {data.sequence_length} positions"
    present = f"{shards} local shards are present in full" if shards else "shards at URLs were not looked at"
    yield f"          {present}; {run.packs.packs} packs were read and laid out"
    if config.data.heldout is not None:
        heldout, packs = open_heldout(config, data)
        yield f"  heldout {heldout}: {len(packs)} packs would be measured"
    checkpoints = list_checkpoints(Path(config.train.output))
    if checkpoints:  # the newest one that is not obviously damaged: hashing all files could take an hour
        found = (one for one in reversed(checkpoints) if not find_damage(one, lambda _: [META]))
        yield from _resumption(config, data, next(found, checkpoints[-1]))
    else:
        if initial := open_initial_weights(config, data, select=lambda _: []):
            yield f"  initial {initial.report}".replace("\n", "\n          ")
        yield f"  output  {config.train.output}: a new run would start here"
    needed = (config.train.keep_checkpoints + 1) * run.checkpoint_bytes
    free = shutil.disk_usage(folder).free
    warning = "" if needed <= free else "   WARNING: not enough"
    yield f"          {_size(free)} free; checkpoints need up to {_size(needed)}{warning}"


def _resumption(config: Config, data: Mixture, checkpoint: Path) -> Iterator[str]:
    """Yield what training would say before it resumes from a checkpoint, whose files are not read in full.

    Raises:
        InputError: training would refuse the settings.
    """
    saved, train = read_meta(checkpoint), config.train
    # Only the device that trains decides what "auto" means.
    bf16 = (saved.precision if train.precision == "auto" else train.precision) == "bf16"
    check_same_run(checkpoint, saved, initial_meta(config, data, saved.world_size, bf16=bf16))
    finished = saved.step >= train.steps
    yield f"  output  {train.output}: " + (
        "a finished run" if finished else f"a run; training would resume from {checkpoint.name} if its files are intact"
    )
    for note in [] if finished else resume_notes(Path(train.output), checkpoint, config):
        yield f"          {note}"


def _parameters(config: Config, run: Estimate) -> Iterator[str]:
    t = config.model.transformer
    yield "\nPARAMETERS"
    for part, count in run.parameters.items():
        yield f"  {part:<12} {count:>16,}"
    yield f"  {'all':<12} {run.num_parameters:>16,}"
    yield (
        f"  {t.depth} blocks of width {t.dim}, {t.num_heads} query and {t.num_kv_heads} key/value heads of "
        f"{t.head_dim}, feed-forward width {t.hidden_dim}"
    )


def _memory(config: Config, cluster: Cluster, run: Estimate) -> Iterator[str]:
    train, available = config.train, cluster.gpu.memory
    offload = ", optimizer in host memory" if train.offload_optimizer else ""
    setup = f"ZeRO stage {train.zero_stage} on {cluster.gpus:,} GPUs, {_precision(run)}{offload}"
    yield f"\nMEMORY of a GPU ({cluster.gpu_name} with {_size(available)}), {setup}"
    for use, size in run.memory.items():
        yield f"  {_USES[use]:<40} {_size(size):>10}"
    positions = f"{train.micro_batch} x {run.packs.positions:.0f} positions"
    yield f"  and activations of {positions}, by activation_checkpointing:"
    for setting, size in run.activations.items():
        total = sum(run.memory.values()) + size
        chosen = "  <- the setting" if setting == config.model.activation_checkpointing else ""
        fits = f"{total / available:.0%} of the GPU" if total <= available else "DOES NOT FIT"
        yield f"    {setting:<38} {_size(size):>10}   in all {_size(total):>9}, {fits}{chosen}"
    host = run.host_memory + run.checkpoint_bytes / cluster.gpus
    yield f"  host memory for each GPU: {_size(host)} while a checkpoint is written, without the loader"


def _work(config: Config, data: Mixture, cluster: Cluster, run: Estimate) -> Iterator[str]:
    packs, batch, steps = run.packs, config.train.global_batch, config.train.steps
    seconds, tokens = run.step_parts["compute"], batch * packs.tokens
    share = f"{batch:,} packs, {run.accumulation_steps} x {config.train.micro_batch} a GPU"
    epochs = f"{steps * batch / data.num_packs:.3g} epochs"
    yield f"\nWORK, from the mean of the first {packs.packs} packs in training order"
    yield f"  padding          {run.padding:.2%} of positions"
    yield f"  patches          {sum(packs.patches) / packs.tokens:.1%} of tokens"
    yield f"  FLOPs            {run.flops_per_token:.3e} a token, forward and backward, without recomputation"
    yield f"                   {run.attention_share:.1%} of them for the visible pairs of attention"
    yield f"  step             {tokens:,.0f} tokens and {batch * packs.images:,.0f} images in {share}"
    yield f"  run              {steps * tokens:.3e} tokens in {steps:,} steps, {epochs}"
    yield f"  at MFU {cluster.mfu:<9.2g} {tokens * _DAY / seconds:.3e} tokens a day, {_time(seconds)} a step"
    yield f"                   {_time(steps * seconds)} for the run, if compute alone limits it"


def _step(config: Config, cluster: Cluster, run: Estimate) -> Iterator[str]:
    train, parts, sent, longest = config.train, run.step_parts, run.traffic, run.step_parts[run.limit]
    reads, workers = train.global_batch / longest, config.data.workers
    loaders = f"{workers} processes a GPU (data.workers)" if workers else "the training process (data.workers=0)"
    detail = {
        "compute": f"at MFU {cluster.mfu:.2g}",
        "communication": f"each GPU gathers {_size(sent.gathered)} and reduces {_size(sent.reduced)} "
        f"at {_size(cluster.ring_bandwidth)}/s",
        "loader": f"{_time(run.packs.seconds)} a pack (measured here) in {loaders}",
        "checkpoints": f"{_size(run.checkpoint_bytes)} in {cluster.gpus + 2:,} files take "
        f"{_time(run.checkpoint_seconds)} every {train.checkpoint_every:,} steps",
    }
    yield f"\nA STEP on {cluster.gpus:,} GPUs ({cluster.nodes:,} nodes): the time that each part needs"
    for part, seconds in parts.items():
        yield f"  {part:<15}{_time(seconds):>10}   {detail[part]}"
    mfu, whole = cluster.mfu * parts["compute"] / longest, _time(longest * train.steps)
    yield f"  limited by {run.limit}: at least {_time(longest)} a step, {whole} for the run; MFU at most {mfu:.2g}"
    yield f"  at that speed all loaders together read {reads:,.0f} packs and {_size(reads * run.pack_bytes)} a second"


def _assumptions(cluster: Cluster, run: Estimate) -> Iterator[str]:
    peak, link = f"{run.peak / 1e12:.4g} TFLOP/s in {_precision(run)}", _size(cluster.gpu.link)
    yield "\nASSUMPTIONS"
    yield f"  {cluster.gpu_name} by its data sheet: {peak}, {link}/s to the GPUs of its node"
    yield f"  MFU, the fraction of that peak which training reaches: {cluster.mfu:.2g} (--mfu)"
    yield f"  network: {_size(cluster.network)}/s a GPU between nodes of {cluster.gpus_per_node} GPUs (--network)"
    yield f"  shared storage: {_size(cluster.storage)}/s for all nodes together (--storage)"
    yield "  links and storage reach these rates, and the parts of a step overlap fully, so a real step takes longer"
    yield "  memory leaves out temporary buffers, fragmentation, NCCL and CUDA: keep a tenth of the GPU free"
    yield "  activations are those of the Triton kernels; loaders are as fast as this process"
    yield "  the exchange of heads between GPUs that share packs (train.sequence_parallel) is not counted"


def _precision(run: Estimate) -> str:
    return "bf16" if run.itemsize == 2 else "fp32"


def _size(size: float) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size / 1e3:.1f} kB"


def _time(seconds: float) -> str:
    for unit, scale in (("days", _DAY), ("hours", 3600), ("min", 60)):
        if seconds >= 2 * scale:
            return f"{seconds / scale:.1f} {unit}"
    return f"{seconds:.3g} s" if seconds >= 1 or not seconds else f"{1000 * seconds:.3g} ms"


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
