"""The learning rate of each step."""

from __future__ import annotations

import math

from transfusion_fast.config import OptimizerConfig


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """Return the rate of a step, counted from 0: linear warm-up to lr, then the schedule, to min_lr at the last step.

    The schedules are cosine decay; warm-up, stable, decay ("wsd", arXiv 2404.06395), linear here; and no decay.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "wsd":
        decay_steps = config.decay_steps or max(1, steps // 10)
        left = min(1.0, (steps - 1 - step) / decay_steps)
    else:
        progress = min(1.0, (step - config.warmup_steps) / max(1, steps - 1 - config.warmup_steps))
        left = (1 + math.cos(math.pi * progress)) / 2
    return config.min_lr + (config.lr - config.min_lr) * left
