"""Other weights to begin a run from: those of another run, of an exported model, or of a Llama model (llama.py)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from transfusion_fast.config import Config, ModelConfig, TrainConfig
from transfusion_fast.config_reading import changes
from transfusion_fast.data.mixture import Mixture
from transfusion_fast.errors import InputError
from transfusion_fast.model.grouped_layers import MODALITIES, name_in_text
from transfusion_fast.model.sequence import Vocabulary
from transfusion_fast.model.transfusion import Transfusion, read_model_config
from transfusion_fast.model.weights import Shape, WeightFiles, Weights
from transfusion_fast.training.checkpoint_files import META, Select, find_checkpoint, open_weights, read_meta
from transfusion_fast.training.initial_weights import (
    VOCABULARY_TABLES,
    InitialWeights,
    Plan,
    Span,
    transformer_settings,
)
from transfusion_fast.training.llama import from_llama
from transfusion_fast.training.run_folder import is_export, read_data_description


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
        return from_llama(Path(train.init_text_from), model, shapes)
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
    if dropped := _dropped(weights.shapes, model):
        notes.append(f"left out: {', '.join(dropped)}")
    if (old := read_data_description(described).tokenizer.describe()) != (new := _tokenizer(data)):
        notes.append(f"warning: text has the tokenizer {new['name']}, its weights that of {old['name']}; ids are kept")
    return InitialWeights(weights, plan, shapes, tuple(notes))


def _tokenizer(data: Mixture) -> Any:
    return data.datasets[0].index.tokenizer


def _comparable(model: ModelConfig) -> dict[str, Any]:
    """Return the settings that say what a model computes, with their defaults written out."""
    names = ("tie_embeddings", "logit_cap", "num_text_tokens", "size_tokens")
    own = {name: getattr(model.transformer, name) for name in ("modality_weights", "conditioning")}
    diffusion = {name: model.diffusion.with_defaults()[name] for name in ("process", "schedule", "prediction")}
    modalities = model.model_dump(mode="json")["modalities"]
    groups = {"transformer": transformer_settings(model) | own, "diffusion": diffusion, "modalities": modalities}
    return groups | {name: getattr(model, name) for name in names}


def plan_from_model(
    source: ModelConfig, stored: Mapping[str, Shape], model: ModelConfig, shapes: Mapping[str, Shape], where: str
) -> Plan:
    """Return the plan to begin from a model of ours with other modalities, a larger vocabulary or separate weights.

    Modalities whose own weights the source lacks begin from those of text.

    Raises:
        InputError: other changes of a shape, or of the division into heads; the message names the parameters.
    """
    for name in ("heads", "kv_heads"):
        if (old := transformer_settings(source)[name]) != (new := transformer_settings(model)[name]):
            raise InputError(f"model.transformer.{name} must be {old}, that of {where}, got {new}; correct it")
    if model.num_text_tokens < source.num_text_tokens:
        raise InputError(
            f"the vocabulary must hold the {source.num_text_tokens} text ids of {where}, got {model.num_text_tokens}; "
            "prepare the data with a tokenizer that extends the old one"
        )
    for name, value in (("modality_weights", "separate"), ("conditioning", "adaln")):
        if value == getattr(source.transformer, name) != (got := getattr(model.transformer, name)):
            raise InputError(f"model.transformer.{name} must be {value}, as in {where}, got {got}; correct it")
    kept = min(len(source.modalities), len(model.modalities))
    old_size = Vocabulary.of(source).size
    plan: Plan = {}
    wrong = []
    for name, shape in shapes.items():
        origin = name if name in stored else name_in_text(name)
        origin = "embedding.weight" if name == "head.weight" and name not in stored else origin  # tied in the source
        old = stored.get(origin)
        plan[name] = [] if old is None else [Span(0, math.prod(shape), origin)]
        if name in VOCABULARY_TABLES and old == (old_size, *shape[1:]):
            plan[name] = list(_vocabulary_spans(source, model, kept, origin))
        elif old not in (None, shape):
            wrong.append(f"{name} {old} -> {shape}")
    wrong += [
        f"{name} {old} -> none" for name, old in stored.items() if name not in {*shapes, *_dropped(stored, model)}
    ]
    if wrong:
        raise InputError(f"weights of {where} must have the shapes of the model, got {', '.join(wrong)}; correct model")
    return plan


def _dropped(stored: Mapping[str, Shape], model: ModelConfig) -> list[str]:
    """Return the stored parameters of modalities, or of timesteps added to patches, that the new model lacks."""
    numbers = {name: re.search(rf"^(?:codecs|conditions)\.(\d+)|\b{MODALITIES}\.(\d+)", name) for name in stored}
    dropped = [name for name, found in numbers.items() if found and int(found[1] or found[2]) >= len(model.dim_latent)]
    adaln = model.transformer.conditioning == "adaln"
    return dropped + [name for name in stored if adaln and re.match(r"codecs\.\d+\.timestep\.", name)]


def _vocabulary_spans(source: ModelConfig, model: ModelConfig, modalities: int, origin: str) -> Iterator[Span]:
    """Yield the rows of text ids, of <bos> and <eos>, and of the special tokens and sizes in common."""
    width = model.transformer.dim
    old, new = (Vocabulary.of(one) for one in (source, model))
    sizes = (new.first_size, old.first_size, min(new.max_size, old.max_size))
    for start, source_start, rows in ((0, 0, old.num_text_tokens), (new.bos, old.bos, 2 + 2 * modalities), sizes):
        if rows:
            yield Span(start * width, rows * width, origin, source_start * width)
