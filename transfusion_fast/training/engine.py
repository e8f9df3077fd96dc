"""Model, optimizer and DeepSpeed engine of a run; every DeepSpeed setting is derived from the config, once."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any

import deepspeed
import torch
from torch import nn

from transfusion_fast.config import Config, OptimizerConfig
from transfusion_fast.data.loader import Share
from transfusion_fast.errors import InputError
from transfusion_fast.model.transfusion import Transfusion
from transfusion_fast.training.ranks import Ranks, computes_bf16


def make_engine(config: Config, ranks: Ranks, share: Share) -> Any:
    """A DeepSpeed engine around a fresh model: ZeRO-3, so that no rank holds all weights, not even at the start."""
    bf16 = config.train.precision == "bf16" or (config.train.precision == "auto" and computes_bf16(ranks.device))
    settings = deepspeed_settings(config, share, bf16=bf16, cuda=ranks.device.type == "cuda")
    deepspeed.utils.logger.setLevel(logging.WARNING)
    torch.manual_seed(config.train.seed)
    # The dtype comes from the settings: given as an argument, DeepSpeed 0.19 makes it bf16 where fp16 is not supported.
    with deepspeed.zero.Init(config_dict_or_path=settings, mem_efficient_linear=False):
        model = Transfusion(config.model)
    optimizer = make_optimizer(model, config.optimizer)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    return engine


def deepspeed_settings(config: Config, share: Share, *, bf16: bool, cuda: bool) -> dict[str, Any]:
    """The engine's settings: the derived ones, with the config's raw `deepspeed` section merged in.

    Raises:
        InputError: a raw setting that contradicts a derived one.
    """
    derived = {
        "train_batch_size": share.global_batch,
        "train_micro_batch_size_per_gpu": share.micro_batch,
        "gradient_accumulation_steps": share.accumulation_steps,
        "gradient_clipping": config.optimizer.clip,
        "bf16": {"enabled": bf16},
        "fp16": {"enabled": False},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": cuda,
            "contiguous_gradients": True,
            "memory_efficient_linear": False,  # a linear layer in Python that saves nothing here
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
    }
    return _merge(derived, config.deepspeed, "deepspeed")


def _merge(derived: dict[str, Any], raw: Mapping[str, Any], path: str) -> dict[str, Any]:
    merged = dict(derived)
    for key, value in raw.items():
        name = f"{path}.{key}"
        if isinstance(value, Mapping) and isinstance(derived.get(key, {}), dict):
            merged[key] = _merge(derived.get(key, {}), value, name)
        elif key in derived and derived[key] != value:
            raise InputError(f"config: {name} is derived to be {derived[key]!r}, got {value!r}; drop it")
        else:
            merged[key] = value
    return merged


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW; vectors (norms, biases) are not decayed."""
    groups = [
        {"params": parameters, "weight_decay": decay}
        for decay, parameters in ((config.weight_decay, _of(model, matrix=True)), (0.0, _of(model, matrix=False)))
    ]
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)


def _of(model: nn.Module, *, matrix: bool) -> list[nn.Parameter]:
    # ZeRO-3 leaves an empty parameter behind on each rank; the whole one's shape is in ds_shape.
    return [p for p in model.parameters() if (len(getattr(p, "ds_shape", p.shape)) > 1) == matrix]


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """Of the step (from 0): linear warm-up to lr, then a cosine that reaches min_lr at the last step."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, steps - 1 - config.warmup_steps))
    return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * progress)) / 2


def set_learning_rate(groups: Iterable[dict[str, Any]], lr: float) -> None:
    """Gives all parameter groups one learning rate."""
    for group in groups:
        group["lr"] = lr
