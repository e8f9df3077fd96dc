"""Other weights to begin a run from: those of another run, an exported model, or the text side of a Llama model.

A plan says for each parameter of the new model which of its elements are copied, and from where; a rank then reads only
what its own slices need. Elements without a source keep their initial values, and are named.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, TypeAdapter, model_validator
from torch import Tensor

from transfusion_fast.config import Config, ModelConfig, TrainConfig
from transfusion_fast.config_reading import changes
from transfusion_fast.data.mixture import Mixture
from transfusion_fast.errors import InputError
from transfusion_fast.files import parse_json
from transfusion_fast.model.sequence import Vocabulary
from transfusion_fast.model.transfusion import MODEL_CONFIG, Transfusion, read_model_config
from transfusion_fast.model.weights import Shape, WeightFiles, Weights
from transfusion_fast.training.run_folder import (
    META,
    Select,
    find_checkpoint,
    is_export,
    open_weights,
    read_data_description,
    read_meta,
)

_VOCABULARY_TABLES = ("embedding.weight", "head.weight")
_LLAMA_BLOCK = {
    "attention_norm.weight": ("input_layernorm.weight",),
    "attention.qkv.weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "attention.out.weight": ("self_attn.o_proj.weight",),
    "mlp_norm.weight": ("post_attention_layernorm.weight",),
    "mlp.gate_up.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.down.weight": ("mlp.down_proj.weight",),
}
"""Parameters of a block, and the matrices of a Llama block whose rows they hold, in this order."""
_LLAMA_EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class Span:
    """Elements [start, start + length) of a flattened parameter, copied from those of `source` at source_start."""

    start: int
    length: int
    source: str
    source_start: int = 0


Plan = dict[str, list[Span]]
"""The spans of every parameter, in order of their starts."""


@dataclass(frozen=True, eq=False)
class InitialWeights:
    """Weights to begin from.

    Attributes:
        shapes: those of the new model's parameters.
        notes: lines for the user about the source, and how the model differs from it.
    """

    weights: Weights
    plan: Plan
    shapes: Mapping[str, Shape]
    notes: tuple[str, ...]

    def copy(self, name: str, offset: int, target: Tensor) -> None:
        """Fill the elements of `target` that have a source; it is flat and starts at `offset` of the parameter."""
        for span in self.plan[name]:
            start, end = max(span.start, offset), min(span.start + span.length, offset + len(target))
            if start < end:
                source = self.weights.read(span.source, span.source_start + start - span.start, end - start)
                target[start - offset : end - offset].copy_(source)

    @property
    def report(self) -> str:
        """Lines for the user: what is copied from where, and what is not."""
        return "\n".join([*self.notes, f"initialised: {', '.join(self.initialised) or 'nothing'}"])

    @property
    def initialised(self) -> list[str]:
        """The codecs, other parameters and rows that keep their initial values."""
        names = (text for name, shape in self.shapes.items() for text in _missing(name, shape, self.plan[name]))
        return list(dict.fromkeys(".".join(n.split(".")[:2]) if n.startswith("codecs.") else n for n in names))


def open_initial_weights(config: Config, data: Mixture, select: Select) -> InitialWeights | None:
    """Return the weights that `train.init_from` or `train.init_text_from` names; None if neither is set.

    Args:
        select: picks the files of a checkpoint that this rank checks.

    Raises:
        InputError: the weights do not fit the model; the message names the parameters or the setting.
    """
    train, model = config.train, config.model
    with torch.device("meta"):
        shapes = {name: tuple(x.shape) for name, x in Transfusion(model).named_parameters()}
    if train.init_from is not None:
        return _from_model(train, model, shapes, data, select)
    if train.init_text_from is not None:
        return _from_llama(Path(train.init_text_from), model, shapes)
    return None


def _from_model(
    train: TrainConfig,
    model: ModelConfig,
    shapes: Mapping[str, Shape],
    data: Mixture,
    select: Select,
) -> InitialWeights:
    """Plan to begin from a run, a checkpoint of a run, or an exported folder."""
    path, raw = Path(str(train.init_from)).resolve(), train.init_raw
    weights: Weights
    if is_export(path):
        if raw:
            raise InputError(f"train.init_raw needs a run, got {path}, an exported folder; drop it")
        source, weights, described = read_model_config(path), WeightFiles(path), path
    else:
        checkpoint = path if (path / META).is_file() else find_checkpoint(path)
        source, weights = read_meta(checkpoint).config.model, open_weights(checkpoint, raw=raw, select=select)
        path, described = checkpoint, checkpoint.parents[1]
    plan = plan_from_model(source, weights.shapes, model, shapes, str(path))
    notes = [f"weights of {path}"]
    changed = list(changes(_comparable(source), _comparable(model), "model"))
    if changed:
        notes.append(f"model settings that differ from it: {', '.join(changed)}")
    if dropped := _dropped(weights.shapes, len(model.dim_latent)):
        notes.append(f"left out: {', '.join(dropped)}")
    if (old := read_data_description(described).tokenizer.describe()) != (new := _tokenizer(data)):
        notes.append(f"warning: text has the tokenizer {new['name']}, its weights that of {old['name']}; ids are kept")
    return InitialWeights(weights, plan, shapes, tuple(notes))


def _tokenizer(data: Mixture) -> Any:
    return data.datasets[0].index.tokenizer


def _comparable(model: ModelConfig) -> dict[str, Any]:
    """Return the settings that say what a model computes, with their defaults written out."""
    names = ("positions", "objective", "tie_embeddings", "num_text_tokens", "dim_latent")
    return {"transformer": _transformer(model), **{name: getattr(model, name) for name in names}}


def _transformer(model: ModelConfig) -> dict[str, Any]:
    t = model.transformer
    return {
        "dim": t.dim,
        "depth": t.depth,
        "heads": t.num_heads,
        "kv_heads": t.num_kv_heads,
        "ffn_dim": t.hidden_dim,
        "qk_norm": t.qk_norm,
        "rope_theta": t.rope_theta,
        "norm_eps": t.norm_eps,
    }


def plan_from_model(
    source: ModelConfig, stored: Mapping[str, Shape], model: ModelConfig, shapes: Mapping[str, Shape], where: str
) -> Plan:
    """Return the plan to begin from a model of ours with other modalities or a larger vocabulary.

    Raises:
        InputError: other changes of a shape, or of the division into heads; the message names the parameters.
    """
    for name in ("heads", "kv_heads"):
        if (old := _transformer(source)[name]) != (new := _transformer(model)[name]):
            raise InputError(f"model.transformer.{name} must be {old}, that of {where}, got {new}; correct it")
    if model.num_text_tokens < source.num_text_tokens:
        raise InputError(
            f"the vocabulary must hold the {source.num_text_tokens} text ids of {where}, got {model.num_text_tokens}; "
            "prepare the data with a tokenizer that extends the old one"
        )
    kept = min(len(source.dim_latent), len(model.dim_latent))
    old_size = Vocabulary(source.num_text_tokens, len(source.dim_latent)).size
    plan: Plan = {}
    wrong = []
    for name, shape in shapes.items():
        origin = "embedding.weight" if name == "head.weight" and name not in stored else name  # tied in the source
        old = stored.get(origin)
        plan[name] = [] if old is None else [Span(0, math.prod(shape), origin)]
        if name in _VOCABULARY_TABLES and old == (old_size, *shape[1:]):
            plan[name] = list(_vocabulary_spans(source, model, kept, origin))
        elif old not in (None, shape):
            wrong.append(f"{name} {old} -> {shape}")
    wrong += [f"{name} {old} -> none" for name, old in stored.items() if name not in {*shapes, *_dropped(stored, kept)}]
    if wrong:
        raise InputError(f"weights of {where} must have the shapes of the model, got {', '.join(wrong)}; correct model")
    return plan


def _dropped(stored: Mapping[str, Shape], modalities: int) -> list[str]:
    """Return the stored parameters of modalities that the new model does not have."""
    return [name for name in stored if name.startswith("codecs.") and int(name.split(".")[1]) >= modalities]


def _vocabulary_spans(source: ModelConfig, model: ModelConfig, modalities: int, origin: str) -> Iterator[Span]:
    """Yield the rows of text ids, of <bos> and <eos>, and of the special tokens of the modalities in common."""
    width = model.transformer.dim
    old, new = (Vocabulary(one.num_text_tokens, len(one.dim_latent)) for one in (source, model))
    for start, source_start, rows in ((0, 0, old.num_text_tokens), (new.bos, old.bos, 2 + 2 * modalities)):
        yield Span(start * width, rows * width, origin, source_start * width)


class _Llama(BaseModel):
    """What config.json of a Llama model says, without what the blocks of this project could not compute."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None
    hidden_act: Literal["silu"] = "silu"
    attention_bias: Literal[False] = False
    mlp_bias: Literal[False] = False
    use_sliding_window: Literal[False] = False
    bos_token_id: int | list[int] | None = None
    eos_token_id: int | list[int] | None = None

    @model_validator(mode="after")
    def _check(self) -> _Llama:
        rope = self.rope_parameters or self.rope_scaling or {}
        if (kind := rope.get("rope_type", rope.get("type", "default"))) != "default":
            raise ValueError(f"rope_type must be default, got {kind}; give a model without scaled positions")
        if self.head_dim not in (None, self.hidden_size // self.num_attention_heads):
            raise ValueError(f"head_dim must be hidden_size / num_attention_heads, got {self.head_dim}; give another")
        return self

    @property
    def transformer(self) -> dict[str, Any]:
        """The settings by our names."""
        return {
            "dim": self.hidden_size,
            "depth": self.num_hidden_layers,
            "heads": self.num_attention_heads,
            "kv_heads": self.num_key_value_heads or self.num_attention_heads,
            "ffn_dim": self.intermediate_size,
            "qk_norm": False,
            "rope_theta": float((self.rope_parameters or {}).get("rope_theta", self.rope_theta)),
            "norm_eps": self.rms_norm_eps,
        }

    def rows(self, model: ModelConfig, stored: Shape, origin: str) -> Iterator[Span]:
        """Yield the rows of the text ids, and of <bos> and <eos>, which Llama has among its text ids."""
        rows, width = stored
        yield Span(0, min(rows, model.num_text_tokens) * width, origin)
        vocabulary = Vocabulary(model.num_text_tokens, len(model.dim_latent))
        for token, ids in ((vocabulary.bos, self.bos_token_id), (vocabulary.eos, self.eos_token_id)):
            number = ids[0] if isinstance(ids, list) else ids
            if number is not None and 0 <= number < rows:
                yield Span(token * width, width, origin, number * width)


def _from_llama(folder: Path, model: ModelConfig, shapes: Mapping[str, Shape]) -> InitialWeights:
    """Plan to begin from the text side of a folder in the layout of Hugging Face's Llama."""
    path, remedy = folder / MODEL_CONFIG, "give a folder in the layout of Llama"
    if not path.is_file():
        raise InputError(f"train.init_text_from must be a folder with {MODEL_CONFIG}, got {folder}; {remedy}")
    llama = parse_json(TypeAdapter(_Llama), path.read_bytes(), str(path), remedy)
    if difference := ", ".join(changes(_transformer(model), llama.transformer, "model.transformer")):
        raise InputError(f"model.transformer must be that of {folder}, got other values ({difference}); correct them")
    weights = WeightFiles(folder)
    plan = plan_from_llama(llama, weights.shapes, model, shapes, folder)
    used = {span.source for spans in plan.values() for span in spans}
    if unused := [name for name in weights.shapes if name not in used and not name.endswith("rotary_emb.inv_freq")]:
        raise InputError(f"{folder} must hold tensors of Llama alone, got {', '.join(unused):.100} too; give another")
    notes = [f"text weights of {folder}"]
    if (rows := weights.shapes[_LLAMA_EMBEDDING][0]) > model.num_text_tokens:
        notes.append(f"left out: rows {model.num_text_tokens}-{rows - 1} of its vocabulary, but for <bos> and <eos>")
    return InitialWeights(weights, plan, shapes, tuple(notes))


def plan_from_llama(
    llama: _Llama, stored: Mapping[str, Shape], model: ModelConfig, shapes: Mapping[str, Shape], folder: Path
) -> Plan:
    """Return the plan to begin from a Llama model: embeddings, blocks, norm and head, but not codecs.

    Both models rotate the pairs (i, i + D/2) of a head, so that the rows of queries and keys keep their order.

    Raises:
        InputError: a tensor is missing or has another shape, or the model ties embeddings and the folder does not.
    """
    tied = "lm_head.weight" not in stored
    if model.tie_embeddings and not tied:
        raise InputError(f"model.tie_embeddings must be false for {folder}, which has a head, got true; correct it")
    plan: Plan = {name: [] for name in shapes}
    sources = {"norm.weight": ["model.norm.weight"]}
    for number in range(model.transformer.depth):
        for name, tensors in _LLAMA_BLOCK.items():
            sources[f"blocks.{number}.{name}"] = [f"model.layers.{number}.{tensor}" for tensor in tensors]
    for name, parts in sources.items():
        lengths = [math.prod(stored.get(part, (0,))) for part in parts]
        starts = [0, *accumulate(lengths)]
        plan[name] = [Span(*span) for span in zip(starts, lengths, parts, strict=False)]
        if starts[-1] != math.prod(shapes[name]):
            got = ", ".join(f"{part} {stored.get(part, 'missing')}" for part in parts)
            raise InputError(f"{folder}: {name} must have the shape {shapes[name]}, got {got}; give another folder")
    head = _LLAMA_EMBEDDING if tied else "lm_head.weight"
    for name, origin in zip(_VOCABULARY_TABLES, (_LLAMA_EMBEDDING, head), strict=True):
        found, width = stored.get(origin, ()), model.transformer.dim
        if found[1:] != (width,):
            raise InputError(f"{folder}: {origin} must have rows of {width} values, got {found}; give another folder")
        if name in shapes:
            plan[name] = list(llama.rows(model, stored[origin], origin))
    return plan


def _missing(name: str, shape: Shape, spans: list[Span]) -> Iterator[str]:
    """Yield descriptions of what no span covers: the parameter, or ranges of its rows."""
    row, end = math.prod(shape[1:]), math.prod(shape)
    covered = 0
    for start, length in [*((span.start, span.length) for span in spans), (end, 0)]:
        if start > covered:
            rows = f"rows {covered // row}-{start // row - 1} of "
            yield name if start - covered == end else rows + name
        covered = start + length
