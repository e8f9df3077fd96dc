"""The weights of a folder in the layout of Hugging Face's Llama, to begin the text side of a run from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, TypeAdapter, model_validator

from transfusion_fast.config import ModelConfig
from transfusion_fast.config_reading import changes
from transfusion_fast.errors import InputError
from transfusion_fast.files import parse_json
from transfusion_fast.model.grouped_layers import name_in_text
from transfusion_fast.model.sequence import Vocabulary
from transfusion_fast.model.transfusion import MODEL_CONFIG
from transfusion_fast.model.weights import Shape, WeightFiles
from transfusion_fast.training.initial_weights import (
    VOCABULARY_TABLES,
    InitialWeights,
    Plan,
    Span,
    transformer_settings,
)

_BLOCK = {
    "attention_norm.weight": ("input_layernorm.weight",),
    "attention.qkv.weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "attention.out.weight": ("self_attn.o_proj.weight",),
    "mlp_norm.weight": ("post_attention_layernorm.weight",),
    "mlp.gate_up.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.down.weight": ("mlp.down_proj.weight",),
}
"""Parameters of a block, and the matrices of a Llama block whose rows they hold, in this order."""
_EMBEDDING = "model.embed_tokens.weight"


class Llama(BaseModel):
    """The settings in config.json of a Llama model, limited to values that the blocks of this project can compute."""

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
    def _check(self) -> Llama:
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
        vocabulary = Vocabulary.of(model)
        for token, ids in ((vocabulary.bos, self.bos_token_id), (vocabulary.eos, self.eos_token_id)):
            number = ids[0] if isinstance(ids, list) else ids
            if number is not None and 0 <= number < rows:
                yield Span(token * width, width, origin, number * width)


def from_llama(folder: Path, model: ModelConfig, shapes: Mapping[str, Shape]) -> InitialWeights:
    """Plan to begin from the text side of a folder in the layout of Hugging Face's Llama."""
    path, remedy = folder / MODEL_CONFIG, "give a folder in the layout of Llama"
    if not path.is_file():
        raise InputError(f"train.init_text_from must be a folder with {MODEL_CONFIG}, got {folder}; {remedy}")
    llama = parse_json(TypeAdapter(Llama), path.read_bytes(), str(path), remedy)
    if difference := ", ".join(changes(transformer_settings(model), llama.transformer, "model.transformer")):
        raise InputError(f"model.transformer must be that of {folder}, got other values ({difference}); correct them")
    weights = WeightFiles(folder)
    plan = plan_from_llama(llama, weights.shapes, model, shapes, folder)
    used = {span.source for spans in plan.values() for span in spans}
    if unused := [name for name in weights.shapes if name not in used and not name.endswith("rotary_emb.inv_freq")]:
        raise InputError(f"{folder} must hold tensors of Llama alone, got {', '.join(unused):.100} too; give another")
    notes = [f"text weights of {folder}"]
    if (rows := weights.shapes[_EMBEDDING][0]) > model.num_text_tokens:
        notes.append(f"left out: rows {model.num_text_tokens}-{rows - 1} of its vocabulary, but for <bos> and <eos>")
    return InitialWeights(weights, plan, shapes, tuple(notes))


def plan_from_llama(
    llama: Llama, stored: Mapping[str, Shape], model: ModelConfig, shapes: Mapping[str, Shape], folder: Path
) -> Plan:
    """Return the plan to begin from a Llama model: embeddings, blocks, norm and head, but not codecs.

    Modalities that have weights of their own begin from those of the blocks and the norm too.

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
        for name, tensors in _BLOCK.items():
            sources[f"blocks.{number}.{name}"] = [f"model.layers.{number}.{tensor}" for tensor in tensors]
    for name in shapes:
        if (parts := sources.get(name_in_text(name))) is None:
            continue
        lengths = [math.prod(stored.get(part, (0,))) for part in parts]
        starts = [0, *accumulate(lengths)]
        plan[name] = [Span(*span) for span in zip(starts, lengths, parts, strict=False)]
        if starts[-1] != math.prod(shapes[name]):
            got = ", ".join(f"{part} {stored.get(part, 'missing')}" for part in parts)
            raise InputError(f"{folder}: {name} must have the shape {shapes[name]}, got {got}; give another folder")
    head = _EMBEDDING if tied else "lm_head.weight"
    for name, origin in zip(VOCABULARY_TABLES, (_EMBEDDING, head), strict=True):
        found, width = stored.get(origin, ()), model.transformer.dim
        if found[1:] != (width,):
            raise InputError(f"{folder}: {origin} must have rows of {width} values, got {found}; give another folder")
        if name in shapes:
            plan[name] = list(llama.rows(model, stored[origin], origin))
    return plan
