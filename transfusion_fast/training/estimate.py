"""An estimate of a run before it starts: its memory, time, network traffic, checkpoints and reads.

Bytes of ZeRO and Adam: arXiv 1910.02054, sections 3 and 7, as DeepSpeed 0.19 arranges them for the settings of
engine.py and its own defaults; the config's raw `deepspeed` section is not read.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from transfusion_fast.config import Config, ModelConfig
from transfusion_fast.data.batch import KeyedPack
from transfusion_fast.data.loader import BatchSplit, batch_builder
from transfusion_fast.data.mixture import Mixture, MixtureReader
from transfusion_fast.errors import DataError, InputError
from transfusion_fast.model.codec import kept_bytes
from transfusion_fast.model.grouped_layers import of_text
from transfusion_fast.model.loss import SMALL_VOCABULARY
from transfusion_fast.model.sequence import Vocabulary
from transfusion_fast.model.transfusion import Transfusion
from transfusion_fast.model.weights import Shape
from transfusion_fast.training.flops import GPU_NAMES, Gpu, find_gpu, gpu_peak, training_flops

_FP32 = 4
_REDUCE_BUCKET, _LIVE_PARAMETERS = 5e8, 1e9  # DeepSpeed's reduce_bucket_size and stage3_max_live_parameters


@dataclass(frozen=True)
class Cluster:
    """The machine that a run is estimated for. Bandwidths are in bytes a second and in each direction."""

    gpu_name: str
    gpus: int
    gpus_per_node: int
    mfu: float
    """Assumed model FLOPs utilization."""
    network: float
    """Bandwidth between nodes for each GPU."""
    storage: float
    """Bandwidth of the shared storage for all nodes together."""

    def __post_init__(self) -> None:
        """Raise InputError for an unknown GPU or a number out of its range."""
        for good, what, rule, got in (
            (find_gpu(self.gpu_name), "--gpu", f"one of {', '.join(GPU_NAMES)}", self.gpu_name),
            (self.gpus > 0, "--gpus", "at least 1", self.gpus),
            (self.gpus_per_node > 0, "--gpus-per-node", "at least 1", self.gpus_per_node),
            (0 < self.mfu <= 1, "--mfu", "above 0 and at most 1", self.mfu),
            (self.network > 0, "--network", "above 0", self.network),
            (self.storage > 0, "--storage", "above 0", self.storage),
        ):
            if not good:
                raise InputError(f"{what} must be {rule}, got {got}; correct it")
        if self.gpus > self.gpus_per_node and self.gpus % self.gpus_per_node:
            raise InputError(
                f"--gpus must be a multiple of --gpus-per-node={self.gpus_per_node}, got {self.gpus}; correct it"
            )

    @property
    def gpu(self) -> Gpu:
        """Data sheet of the GPU."""
        gpu = find_gpu(self.gpu_name)
        assert gpu is not None
        return gpu

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return -(-self.gpus // self.gpus_per_node)

    @property
    def ring_bandwidth(self) -> float:
        """Bandwidth for each GPU of a collective over all GPUs.

        A ring enters and leaves each node once, so that a node's network adapters share what one GPU sends.
        """
        return self.gpu.link if self.nodes == 1 else min(self.gpu.link, self.gpus_per_node * self.network)


@dataclass(frozen=True)
class PackMeans:
    """Means over the first packs of a run, in training order, laid out as training does."""

    packs: int
    """Number of packs that were read."""
    tokens: float
    positions: float
    """Positions with padding."""
    supervised: float
    images: float
    patches: tuple[float, ...]
    """Patches of each modality."""
    trained_patches: tuple[float, ...]
    """Those but for clean images beside noised copies."""
    area: float
    """Visible (query, key) pairs."""
    seconds: float
    """Seconds to read and lay out a pack, measured in this process."""


def read_packs(config: Config, data: Mixture, count: int) -> PackMeans:
    """Read the first packs that a run would train on, at most `count`.

    Raises:
        DataError: a local shard is missing or truncated, or a pack cannot be read.
    """
    builder, window = batch_builder(config, data, 1), config.data.shuffle_window
    order, count = data.order(config.train.seed, window), min(count, data.num_packs)
    try:
        data.check_shards()
        reader, start, rows = MixtureReader(data, window), time.perf_counter(), []
        for epoch, number in map(order.__getitem__, range(count)):
            batch = builder([KeyedPack(reader.read(number), epoch, number)])
            patches = [n for images in batch.modalities for n in (len(images.latents), images.trained_patches)]
            lengths = batch.num_tokens, len(batch.tokens), len(batch.supervised)
            rows.append([*lengths, batch.num_images, batch.layout.area, *patches])
    except InputError as error:
        raise DataError(str(error)) from error
    seconds = (time.perf_counter() - start) / count
    tokens, positions, supervised, images, area, *patches = (sum(column) / count for column in zip(*rows, strict=True))
    every, trained = tuple(patches[::2]), tuple(patches[1::2])
    return PackMeans(count, tokens, positions, supervised, images, every, trained, area, seconds)


def bytes_per_pack(data: Mixture) -> float:
    """Return the mean size of a pack in its shard, over the mixture's packs as they are drawn."""
    drawn = [float(d.share) * d.index.num_packs / d.index.tokens for d in data.datasets]
    sizes = [sum(shard.bytes for shard in d.index.shards) / d.index.num_packs for d in data.datasets]
    return sum(weight * size for weight, size in zip(drawn, sizes, strict=True)) / sum(drawn)


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """Return the number of parameters of each part of the model, without allocating them."""
    with torch.device("meta"):
        model = Transfusion(config)
    parts = {name: part for name, part in model.named_children() if name not in ("encoders", "decoders")}
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    return counts | ({"head": 0} if config.tie_embeddings else {})


def frozen_parameters(config: Config) -> int:
    """Return the number of parameters that are not trained."""
    return sum(math.prod(shape) for name, shape in _shapes(config).items() if not _is_trained(name, config))


def _shapes(config: Config) -> dict[str, Shape]:
    with torch.device("meta"):
        return {name: tuple(x.shape) for name, x in Transfusion(config.model).named_parameters()}


def _is_trained(name: str, config: Config) -> bool:
    return config.train.freeze == "none" or not of_text(name)


def state_memory(parameters: int, config: Config, gpus: int, itemsize: int) -> tuple[dict[str, float], float]:
    """Return bytes of a GPU by use, and bytes of host memory for each GPU.

    AdamW keeps fp32 weights and two moments; Muon keeps one momentum of the blocks' matrices instead. Gradients are
    summed in fp32; at stage 1 in bf16 DeepSpeed also keeps those of the whole model in bf16. Stage 3 holds the weights
    of about a billion parameters gathered.
    """
    train, trained = config.train, parameters - frozen_parameters(config)
    shard = trained / gpus
    gradients = _FP32 * shard if train.zero_stage > 1 else trained * (_FP32 + (itemsize if itemsize < _FP32 else 0))
    optimizer = _FP32 * optimizer_values(parameters, config) / gpus
    ema = _FP32 * shard if train.ema_decay else 0.0
    if train.zero_stage == 3:
        weights = itemsize * parameters / gpus
        buffers = itemsize * (_REDUCE_BUCKET + min(parameters, _LIVE_PARAMETERS))
    else:
        weights, buffers = itemsize * parameters, 2 * itemsize * min(trained, _REDUCE_BUCKET)
    host = 0.0
    if train.offload_optimizer:  # the step on the CPU also needs the gradients there, once more while they accumulate
        host, optimizer, ema = optimizer + ema + 2 * _FP32 * shard, 0.0, 0.0
        gradients = 0.0 if train.zero_stage > 1 else gradients
    uses = {"weights": weights, "gradients": gradients, "optimizer": optimizer, "ema": ema, "buffers": buffers}
    return uses, host


def optimizer_values(parameters: int, config: Config) -> int:
    """Return the number of fp32 values that the optimizer keeps on all GPUs together: weights and its state."""
    muon, shapes = config.optimizer.name == "muon", _shapes(config)
    hidden = [shape for name, shape in shapes.items() if name.startswith("blocks.") and _is_trained(name, config)]
    matrices = sum(math.prod(shape) for shape in hidden if len(shape) > 1)
    return 3 * (parameters - frozen_parameters(config)) - muon * matrices


def kept_activations(
    model: ModelConfig,
    setting: str,
    positions: float,
    supervised: float,
    patches: Sequence[float],
    trained: Sequence[float],
    itemsize: int,
) -> float:
    """Return the bytes that the forward pass of a micro-batch keeps for backward, on the Triton backend.

    Args:
        setting: value of `model.activation_checkpointing`.
        positions: T, with padding. supervised: positions with a label. patches: those of each modality; trained: those
            but for clean images beside noised copies.
    """
    vocabulary, dim = Vocabulary.of(model).size, model.transformer.dim
    rotary, norm = _FP32 * model.transformer.head_dim, itemsize * dim
    # Small vocabularies keep their logits in fp32; large ones are computed in chunks and again in backward.
    head = _FP32 * (dim + vocabulary) if vocabulary <= SMALL_VOCABULARY else itemsize * dim
    codecs = 0 if _is_grouped(model) else sum(patches) * itemsize * dim  # what is written over the embedded tokens
    for modality, encoded, decoded in zip(model.modalities, patches, trained, strict=True):
        encoding, decoding = kept_bytes(modality, dim, itemsize)
        codecs += encoded * encoding + decoded * decoding
    blocks = model.transformer.depth * _kept_by_block(model, setting, positions, sum(patches), itemsize)
    return blocks + positions * (rotary + norm) + supervised * head + codecs


def activation_memory(
    model: ModelConfig,
    setting: str,
    positions: float,
    supervised: float,
    patches: Sequence[float],
    trained: Sequence[float],
    itemsize: int,
) -> float:
    """Return the peak memory of activations: those kept by all blocks, and those that one block recomputes."""
    none, kept = (_kept_by_block(model, name, positions, sum(patches), itemsize) for name in ("none", setting))
    return kept_activations(model, setting, positions, supervised, patches, trained, itemsize) + none - kept


def _is_grouped(model: ModelConfig) -> bool:
    return model.transformer.conditioning == "adaln" or model.transformer.modality_weights == "separate"


def _kept_by_block(model: ModelConfig, setting: str, positions: float, patches: float, itemsize: int) -> float:
    """Return the bytes that a block keeps."""
    t = model.transformer
    q, kv = t.num_heads * t.head_dim, t.num_kv_heads * t.head_dim
    if setting == "full":
        return positions * itemsize * t.dim
    output_and_lse = itemsize * q + _FP32 * t.num_heads
    if setting == "selective":
        return positions * (itemsize * t.dim + output_and_lse)
    # The inputs of two norms, and of the two matrices after them; q, k and v as projected, of which attention reads v;
    # q and k rotated; gate and up, and their product.
    norms = 2 * 2 * itemsize * t.dim
    kept = norms + itemsize * (q + 2 * kv) + itemsize * (q + kv) + output_and_lse + itemsize * 3 * t.hidden_dim
    adaln = t.conditioning == "adaln"
    if _is_grouped(model):  # the output of attention, and with QK norm its input, by groups
        kept += itemsize * (q + t.qk_norm * (q + 2 * kv))
    kept += 2 * t.dim * (t.dropout > 0)  # which values are kept, a byte each
    # Six vectors of each patch; what is scaled, and what is multiplied by a gate.
    return positions * kept + patches * adaln * itemsize * 10 * t.dim


@dataclass(frozen=True)
class Traffic:
    """Bytes that each GPU sends in a step; it receives as many."""

    gathered: float
    reduced: float


def traffic(parameters: int, stage: int, accumulation_steps: int, gpus: int, itemsize: int, frozen: int = 0) -> Traffic:
    """Return the traffic of ring collectives for ZeRO (arXiv 1910.02054, section 7).

    Stage 3 gathers all weights in forward, and in backward again those beyond the billion that stay gathered, and
    reduces and scatters the gradients, for each micro-batch. Stages 1 and 2 gather the new weights once; DeepSpeed sums
    their gradients by an all-reduce, which is twice the bytes, at stage 2 for each micro-batch. Frozen parameters are
    gathered at stage 3 alone, and have no gradients.
    """
    once = parameters * itemsize * (gpus - 1) / gpus
    trained = once * (1 - frozen / parameters)
    if stage == 3:
        again = max(0.0, 1 - _LIVE_PARAMETERS / parameters)
        return Traffic(accumulation_steps * once * (1 + again), accumulation_steps * trained)
    return Traffic(trained, 2 * trained * (accumulation_steps if stage == 2 else 1))


@dataclass(frozen=True)
class Estimate:
    """A run on paper. Bytes, seconds, and floating point operations; memory and traffic are those of one GPU."""

    parameters: Mapping[str, int]
    itemsize: int
    """Bytes of a weight in computation."""
    accumulation_steps: int
    memory: Mapping[str, float]
    """Bytes by use, without activations."""
    host_memory: float
    activations: Mapping[str, float]
    """Bytes by `model.activation_checkpointing`."""
    packs: PackMeans
    padding: float
    """Fraction of positions."""
    flops_per_token: float
    attention_share: float
    """Fraction of the operations that attention over pairs of positions takes."""
    peak: float
    """Operations a second of one GPU."""
    traffic: Traffic
    checkpoint_bytes: float
    checkpoint_seconds: float
    pack_bytes: float
    step_parts: Mapping[str, float]
    """Seconds a step by what could limit it: compute, communication, loader, checkpoints."""

    @property
    def num_parameters(self) -> int:
        """Parameters of all parts."""
        return sum(self.parameters.values())

    @property
    def limit(self) -> str:
        """The part of a step that takes longest."""
        return max(self.step_parts, key=lambda part: self.step_parts[part])


def estimate(config: Config, data: Mixture, cluster: Cluster, packs: PackMeans) -> Estimate:
    """Calculate a run of `config` on `data`, whose first packs have these means.

    Raises:
        InputError: GPUs and micro-batches do not divide the global batch.
    """
    train, model, gpus = config.train, config.model, cluster.gpus
    split = BatchSplit(0, gpus, train.micro_batch, train.global_batch, train.sequence_parallel)
    dtype = torch.float32 if train.precision == "fp32" else torch.bfloat16  # which all known GPUs compute natively
    peak, itemsize = gpu_peak(cluster.gpu, dtype), dtype.itemsize
    parameters = count_parameters(model)
    total = sum(parameters.values())
    memory, host = state_memory(total, config, gpus, itemsize)
    packs_of_gpu = train.micro_batch / train.sequence_parallel
    positions, supervised = packs_of_gpu * packs.positions, packs_of_gpu * packs.supervised
    patches, trained = ([packs_of_gpu * x for x in counts] for counts in (packs.patches, packs.trained_patches))
    frozen, counts = frozen_parameters(config), (model, packs.tokens, packs.supervised, packs.patches)
    flops, matrices = (
        training_flops(*counts, area, decoded=packs.trained_patches, frozen_text=frozen > 0) for area in (packs.area, 0)
    )
    sent = traffic(total, train.zero_stage, split.accumulation_steps, gpus, itemsize, frozen)
    averages = total - frozen if train.ema_decay else 0
    checkpoint = _FP32 * (frozen + optimizer_values(total, config) + averages)
    return Estimate(
        parameters=parameters,
        itemsize=itemsize,
        accumulation_steps=split.accumulation_steps,
        memory=memory,
        host_memory=host,
        activations={
            setting: activation_memory(model, setting, positions, supervised, patches, trained, itemsize)
            for setting in ("none", "selective", "full")
        },
        packs=packs,
        padding=1 - packs.tokens / packs.positions,
        flops_per_token=flops / packs.tokens,
        attention_share=1 - matrices / flops,
        peak=peak,
        traffic=sent,
        checkpoint_bytes=checkpoint,
        checkpoint_seconds=checkpoint / cluster.storage,
        pack_bytes=bytes_per_pack(data),
        step_parts={
            "compute": flops * train.global_batch / (gpus * peak * cluster.mfu),
            "communication": (sent.gathered + sent.reduced) / cluster.ring_bandwidth,
            "loader": train.global_batch / split.groups * packs.seconds / max(1, config.data.workers),
            "checkpoints": checkpoint / cluster.storage / train.checkpoint_every,
        },
    )
