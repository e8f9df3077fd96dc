"""The training loop, from the first step or the last checkpoint to the end."""

from __future__ import annotations

import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from transfusion_fast.config import Config
from transfusion_fast.data.loader import Share, training_batches
from transfusion_fast.data.mixture import Mixture
from transfusion_fast.errors import InputError
from transfusion_fast.model import ops
from transfusion_fast.model.loss import Counts
from transfusion_fast.model.sequence import PackedBatch
from transfusion_fast.training.checkpoint import Checkpoints
from transfusion_fast.training.engine import learning_rate, make_engine, set_learning_rate
from transfusion_fast.training.metrics import Clock, MetricsLog, Row, progress_line
from transfusion_fast.training.ranks import Ranks
from transfusion_fast.training.run_folder import Meta, describe_data, write_config, write_data_description


def train(config: Config, data: Mixture, ranks: Ranks) -> None:
    """Trains to `config.train.steps`, resuming from the newest whole checkpoint of the output folder.

    Raises:
        InputError: a checkpoint of another run, unreadable data, or too many steps without a finite gradient.
    """
    share = Share(ranks.rank, ranks.world_size, config.train.micro_batch, config.train.global_batch)
    if not config.data.quarantine:  # to which a shard that is missing is no more than its packs
        ranks.together(lambda: data.check_shards(*ranks.on_node))  # each node may have disks of its own
    run = Path(config.train.output)
    checkpoints = Checkpoints(run, ranks, config.train.keep_checkpoints)
    found = checkpoints.newest_whole()
    engine = make_engine(config, ranks, share)
    meta = _describe(config, data, ranks, engine)
    if found is not None:
        meta = checkpoints.restore(engine, found, meta)
    ranks.together(lambda: _announce(config, data, ranks, share, engine, meta))
    if meta.step < config.train.steps:
        _Loop(config, data, ranks, share, engine, checkpoints, meta).run()


class _Loop:
    """The state of a training loop between steps: `meta` is all that a checkpoint adds to the engine's own."""

    def __init__(
        self,
        config: Config,
        data: Mixture,
        ranks: Ranks,
        share: Share,
        engine: Any,
        checkpoints: Checkpoints,
        meta: Meta,
    ):
        self.config, self.ranks, self.share, self.engine = config, ranks, share, engine
        self.checkpoints, self.meta = checkpoints, meta
        pin = ranks.device.type == "cuda"
        self.stream = training_batches(config, data, share, meta.packs_consumed, pin_memory=pin)
        self.log = MetricsLog(Path(config.train.output) / "metrics.jsonl", meta.step) if ranks.is_main else None
        self.clock = Clock(config.train.steps)
        self.skipped_in_a_row = 0

    def run(self) -> None:
        """Steps until the end, or until some rank is asked to stop; either way ends with a checkpoint.

        Raises:
            InputError: on every rank alike, for what any of them cannot read, or for a gradient that stays not finite.
        """
        settings, stop = self.config.train, StopRequest()
        while self.meta.step < settings.steps:
            stopping = self._step(stop.requested or self.ranks.abandoned)
            due = stopping or self.meta.step == settings.steps or self.meta.step % settings.checkpoint_every == 0
            if due and not self.skipped_in_a_row:  # what a streak of NaN leaves must not push out a good checkpoint
                self.checkpoints.save(self.engine, self.meta)
            if stopping:
                if self.ranks.is_main:
                    print(f"stopped at step {self.meta.step}; the same command goes on from there", flush=True)
                return

    def _step(self, stop_requested: bool) -> bool:
        """One optimizer step; returns whether any rank was asked to stop."""
        batches, counts, tokens, stopping, quarantined = self._next_batches(stop_requested)
        lr = learning_rate(self.meta.step, self.config.train.steps, self.config.optimizer)
        set_learning_rate(self.engine.optimizer.param_groups, lr)
        losses = [self._micro_step(batch, counts) for batch in batches]
        step = self.meta.step + 1
        self._check_skipped()
        self.meta = replace(
            self.meta,
            step=step,
            packs_consumed=self.meta.packs_consumed + self.share.global_batch,
            skipped_steps=self.engine.skipped_steps,
            quarantined=quarantined,
        )
        self.clock.add(tokens)
        if step % self.config.train.log_every == 0 or step == self.config.train.steps:
            self._report(losses, lr)
        return stopping

    def _next_batches(self, stop_requested: bool) -> tuple[list[PackedBatch], Counts, float, bool, int]:
        """This rank's batches of a step, and what all ranks agree on before computing anything.

        Returns:
            (batches, what the losses are divided by, tokens of the step, whether any rank was asked to stop, packs
            quarantined so far).
        """
        loaded = [next(self.stream) for _ in range(self.share.accumulation_steps)]
        batches = [one.batch for one in loaded]
        unreadable = [error for one in loaded for error in one.unreadable]
        unfetched = [error for one in loaded for error in one.unfetched]
        own = [(len(b.supervised), b.num_images, b.num_tokens) for b in batches]
        flags = (stop_requested, len(unreadable), len(unfetched))
        supervised, images, tokens, stop, left_out, failed = self.ranks.sum([*map(sum, zip(*own, strict=True)), *flags])
        if failed:  # not the packs' fault: another rank, or the same one tomorrow, would have read them
            raise InputError(self.ranks.gather(unfetched)[0])
        quarantined = self.meta.quarantined + int(left_out)
        if left_out:
            self._quarantine(self.ranks.gather(unreadable), quarantined)
        return batches, Counts(int(supervised), int(images)), tokens, stop > 0, quarantined

    def _quarantine(self, errors: list[str], quarantined: int) -> None:
        """Goes on without packs that cannot be read, as far as the settings allow; all ranks come to the same."""
        allowed = self.config.data.quarantine
        if quarantined > allowed:
            beyond = f" ({quarantined} such packs, data.quarantine allows {allowed})" if allowed else ""
            raise InputError(errors[0] + beyond)
        if self.ranks.is_main:
            for error in errors:
                print(f"quarantined: {error}", flush=True)

    def _micro_step(self, batch: PackedBatch, counts: Counts) -> tuple[Any, Any]:
        """Forward, backward, and DeepSpeed's step, which updates the weights after the last one only."""
        losses = self.engine(batch.to(self.ranks.device, non_blocking=True), counts=counts)
        # The losses are divided by global counts already; DeepSpeed averages gradients over the ranks.
        self.engine.backward(losses.total * self.ranks.world_size, scale_wrt_gas=False)
        self.engine.step()
        return losses.text.detach(), losses.diffusion.detach()

    def _check_skipped(self) -> None:
        skipped = self.engine.skipped_steps > self.meta.skipped_steps
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if self.skipped_in_a_row >= self.config.train.max_skipped_steps:
            raise InputError(
                f"training: the gradient was not finite in {self.skipped_in_a_row} steps in a row up to step "
                f"{self.meta.step + 1}; lower optimizer.lr and resume from the last checkpoint"
            )

    def _report(self, losses: list[tuple[Any, Any]], lr: float) -> None:
        own = [float(sum(part)) for part in zip(*losses, strict=True)]
        text, diffusion = self.ranks.sum(own)
        tokens_per_second, seconds_per_step = self.clock.lap()
        if self.log is None:
            return
        row = Row(
            step=self.meta.step,
            packs=self.meta.packs_consumed,
            loss=text + self.config.model.diffusion_weight * diffusion,
            text_loss=text,
            diffusion_loss=diffusion,
            lr=lr,
            grad_norm=float(self.engine.get_global_grad_norm()),
            tokens_per_second=tokens_per_second,
            skipped_steps=self.meta.skipped_steps,
            quarantined=self.meta.quarantined,
        )
        self.log.write(row)
        print(progress_line(row, self.config.train.steps, seconds_per_step), flush=True)


class StopRequest:
    """Turns SIGTERM and SIGINT into a request to stop after the step; a second SIGINT ends the process at once.

    A launcher answers Ctrl-C with a SIGTERM of its own, so that one never counts as the second.
    """

    def __init__(self) -> None:
        self.requested = False
        self.interrupts = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, _: FrameType | None) -> None:
        self.interrupts += number == signal.SIGINT
        if self.interrupts > 1:
            sys.exit(128 + number)
        self.requested = True


_FREE_TO_CHANGE = {"backend", "activation_checkpointing"}  # settings of how a model computes, not of what it is


def _describe(config: Config, data: Mixture, ranks: Ranks, engine: Any) -> Meta:
    return Meta(
        step=0,
        packs_consumed=0,
        skipped_steps=0,
        world_size=ranks.world_size,
        precision="bf16" if engine.bfloat16_enabled() else "fp32",
        global_batch=config.train.global_batch,
        data=data.fingerprint,
        data_path=str(data),
        order=(config.train.seed, config.data.shuffle_window),
        shares=data.shares,
        model=config.model.model_dump(mode="json", exclude=_FREE_TO_CHANGE),
    )


def _announce(config: Config, data: Mixture, ranks: Ranks, share: Share, engine: Any, meta: Meta) -> None:
    """Saves the resolved config with the run and says what is about to happen."""
    if not ranks.is_main:
        return
    run = Path(config.train.output)
    if meta.step >= config.train.steps:
        print(
            f"{run}: trained to step {meta.step} already; raise train.steps, or give another train.output", flush=True
        )
        return
    run.mkdir(parents=True, exist_ok=True)
    write_data_description(run, describe_data(data, config.data.quarantine > 0))
    changed = write_config(run, config)
    if meta.step and changed:
        print(f"settings changed since the run was last started: {', '.join(changed)}")
    parameters = sum(p.ds_numel for p in engine.module.parameters())
    print(
        f"{run}: {parameters / 1e6:.2f}M parameters, {meta.precision}, {ranks.world_size} x {ranks.device.type}, "
        f"{share.global_batch} packs of {data.sequence_length} a step in {share.accumulation_steps} accumulation steps"
    )
    if config.optimizer.warmup_steps >= config.train.steps:
        print(
            f"warning: optimizer.warmup_steps={config.optimizer.warmup_steps} is the whole of the {config.train.steps} "
            "steps; lower it to train at optimizer.lr"
        )
    begin = f"resuming at step {meta.step}" if meta.step else "training"
    backend = ops.describe(config.model.backend, ranks.device)
    print(f"{begin}, {config.train.steps} steps, {data.num_packs} packs in {data}, {backend}", flush=True)
