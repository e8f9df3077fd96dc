"""The training loop, from the first step or the last checkpoint to the end."""

from __future__ import annotations

import math
import signal
import sys
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import FrameType

import numpy as np
import torch
from torch import Tensor

from transfusion_fast.config import Config
from transfusion_fast.data.loader import STOP_SIGNALS, BatchSplit, check_shared_memory, training_batches
from transfusion_fast.data.mixture import Mixture
from transfusion_fast.errors import DataError, DivergedError, InputError
from transfusion_fast.model import ops
from transfusion_fast.model.loss import Counts
from transfusion_fast.model.packed_batch import PackedBatch
from transfusion_fast.training.checkpoint import Checkpoints
from transfusion_fast.training.counters import Interval, QuarterLosses, Work, mean_losses, peak_memory
from transfusion_fast.training.engine import drop_gradients, make_engine, set_learning_rate
from transfusion_fast.training.flops import peak_flops
from transfusion_fast.training.initialize import open_initial_weights
from transfusion_fast.training.loggers import check_packages, make_loggers
from transfusion_fast.training.metrics import Row
from transfusion_fast.training.profiling import StepProfiler
from transfusion_fast.training.ranks import Ranks
from transfusion_fast.training.resume import initial_meta, resume_notes
from transfusion_fast.training.run_folder import DataDescription, describe_data, write_config, write_data_description
from transfusion_fast.training.samples import PromptSampler
from transfusion_fast.training.schedule import learning_rate
from transfusion_fast.training.slices import averaged_weights, update_ema, write_weights_into
from transfusion_fast.training.terminal import say
from transfusion_fast.training.validation import Validation

_NAMED = 4
"""How many micro-batches the message about a skipped step names; when training diverges, all of them are affected."""


class Trainer:
    """A run on one rank. `meta` is all that a checkpoint stores besides the engine's own state."""

    def __init__(self, config: Config, data: Mixture, ranks: Ranks):
        """Make the engine, and resume from the newest intact checkpoint of the output folder, if there is one.

        Raises:
            InputError: a shard is missing, all checkpoints are damaged, or the checkpoint is of another run.
        """
        self.config, self.data, self.ranks, self.folder = config, data, ranks, Path(config.train.output)
        self.started, self.stop = time.monotonic(), StopRequest()
        train = config.train
        self.split = BatchSplit(
            ranks.rank, ranks.world_size, train.micro_batch, train.global_batch, train.sequence_parallel
        )
        if not config.data.quarantine:  # quarantine treats a missing shard as unreadable packs
            ranks.together(lambda: data.check_shards(*ranks.on_node), DataError)  # each node may have its own disks
        describes = ranks.is_main or config.train.sample_every > 0
        ranks.together(lambda: self.description if describes else None, DataError)
        ranks.together(lambda: check_shared_memory(config, data, ranks.on_node[1]))
        ranks.together(lambda: check_packages(config) if ranks.is_main else None)
        self.checkpoints = Checkpoints(self.folder, ranks, config.train.keep_checkpoints)
        checkpoint = self.checkpoints.newest_intact()
        initial = None if checkpoint else ranks.together(lambda: open_initial_weights(config, data, ranks.own))
        self.validation = self.sampler = None
        if config.train.validate_every:
            self.validation = ranks.together(lambda: Validation(config, data, ranks))
        if config.train.sample_every:
            self.sampler = ranks.together(lambda: PromptSampler(config.train, self.description, self.folder, ranks))
        self.engine = make_engine(config, ranks, self.split)
        self.meta = initial_meta(config, data, ranks.world_size, bf16=self.engine.bfloat16_enabled())
        if checkpoint is not None:
            self.meta = self.checkpoints.restore(self.engine, checkpoint, self.meta)
        if initial is not None:
            write_weights_into(self.engine, initial.copy)
            if ranks.is_main:
                print(initial.report)
        ranks.together(lambda: self._announce(checkpoint) if ranks.is_main else None)
        self.skipped_in_a_row = 0

    @cached_property
    def description(self) -> DataDescription:
        """The properties of the data that sampling needs."""
        return describe_data(self.data, self.config.data.quarantine > 0)

    def run(self) -> bool:
        """Take steps until `train.steps`, or until some rank is asked to stop; save a checkpoint in either case.

        Returns:
            whether the run has reached `train.steps`.

        Raises:
            InputError: on every rank, if any rank cannot read its data, or if gradients stay non-finite.
        """
        settings, first_pack = self.config.train, self.meta.packs_consumed
        if self.meta.step >= settings.steps:
            return True
        pin_memory = self.ranks.device.type == "cuda"
        self.stream = training_batches(self.config, self.data, self.split, first_pack, pin_memory=pin_memory)
        self.peak = self._peak_flops()
        self.quarters = QuarterLosses(self.ranks.device)
        self.loggers = make_loggers(self.config, self.folder, first_step=self.meta.step) if self.ranks.is_main else []
        self.profiler = StepProfiler(settings.profile, self.folder / "profile", self.ranks)
        self.interval = Interval()
        with ExitStack() as stack:
            for logger in self.loggers:
                stack.callback(logger.close)
            stack.callback(self.profiler.close)
            try:
                self._take_steps()
            except InputError:  # on all ranks at the same step
                self.checkpoints.close()
                raise
            self.checkpoints.close()
        finished = self.meta.step >= settings.steps
        if not finished and self.ranks.is_main:
            print(f"stopped at step {self.meta.step}; run the same command to resume", flush=True)
        return finished

    def _peak_flops(self) -> float | None:
        """Return the operations a second that all devices can do; None if that is unknown of any of them."""
        dtype = torch.bfloat16 if self.meta.precision == "bf16" else torch.float32
        peaks = self.ranks.gather([peak_flops(self.ranks.device, dtype)])
        return None if None in peaks else sum(peaks)

    def _take_steps(self) -> None:
        settings, first, start = self.config.train, self.meta.step + 1, time.monotonic()
        while self.meta.step < settings.steps:
            with self.profiler.step(self.meta.step + 1):
                stopping = self._step(self.stop.requested or self.ranks.abandoned or self._out_of_time())
            if self.meta.step == first and settings.compile != "off":
                self.interval = Interval()  # the rates of the first row are those of the steps after this one
                if self.ranks.is_main:
                    say(f"compiled the blocks: the first step took {time.monotonic() - start:.1f} s")
            if not stopping or self.meta.step == settings.steps:  # whoever stops a run does not wait for long
                self._observe()
            if stopping or self.meta.step == settings.steps or self.meta.step % settings.checkpoint_every == 0:
                with self.interval.stall():
                    self.checkpoints.save(self.engine, self.meta)
            if self.skipped_in_a_row >= settings.max_skipped_steps:
                raise DivergedError(
                    f"training: the gradient must be finite, got NaN or infinity in {self.skipped_in_a_row} steps in a "
                    f"row up to step {self.meta.step}; lower optimizer.lr and resume from the last checkpoint"
                )
            if stopping:
                return

    def _observe(self) -> None:
        """Measure the held-out packs and draw samples where they are due, with the average of the weights."""
        settings, validation, sampler = self.config.train, self.validation, self.sampler
        validate = validation is not None and self._is_due(settings.validate_every)
        draw = sampler is not None and self._is_due(settings.sample_every)
        if not validate and not draw:
            return
        with self.interval.apart(), averaged_weights(self.engine):
            if validation and validate:
                row = validation.measure(self.engine.module, self.meta.step)
                for logger in self.loggers:
                    logger.validation(row)
            if sampler and draw:
                self._draw(sampler)

    def _draw(self, sampler: PromptSampler) -> None:
        images, step, last = sampler.draw(self.engine.module), self.meta.step, self.config.train.steps

        def write() -> None:
            path = sampler.write(images, step)
            for logger in self.loggers:
                logger.image("samples", path, step)
            if step == last and (animation := sampler.animate(step)):
                say(f"samples of all steps: {animation}")

        self.ranks.together(lambda: write() if self.ranks.is_main else None)

    def _is_due(self, every: int) -> bool:
        """Return whether something is due that happens every so many steps, 0 for never, and at the last step."""
        return every > 0 and (self.meta.step % every == 0 or self.meta.step == self.config.train.steps)

    def _out_of_time(self) -> bool:
        limit = self.config.train.stop_after
        return limit is not None and time.monotonic() - self.started > 3600 * limit

    def _step(self, stop_requested: bool) -> bool:
        """Take one optimizer step; return whether any rank was asked to stop."""
        batches, work, stopping, quarantined = self._next_batches(stop_requested)
        lr = learning_rate(self.meta.step, self.config.train.steps, self.config.optimizer)
        set_learning_rate(self.engine.optimizer, lr)
        counts = Counts(work.token_weights, work.image_weights)
        positions = self.split.micro_batches(self.meta.packs_consumed)
        losses = [self._micro_step(batch, counts, of[0]) for batch, of in zip(batches, positions, strict=False)]
        self._report_skipped(losses)
        self.meta = replace(
            self.meta,
            step=self.meta.step + 1,
            packs_consumed=self.meta.packs_consumed + self.split.global_batch,
            skipped_steps=self.engine.skipped_steps,
            quarantined=quarantined,
        )
        if self.config.train.ema_decay and not self.skipped_in_a_row:
            update_ema(self.engine, self.config.train.ema_decay, self.meta.step - self.meta.skipped_steps)
        self.interval.add(work)
        for logger in self.loggers:
            logger.step(self.meta.step)
        if self.meta.step % self.config.train.log_every == 0 or self.meta.step == self.config.train.steps:
            self._report(losses, lr)
        return stopping

    def _next_batches(self, stop_requested: bool) -> tuple[list[PackedBatch], Work, bool, int]:
        """Load this rank's batches of a step, and agree with all ranks before any of them computes.

        Returns:
            (batches, work of the step, whether any rank was asked to stop, packs quarantined so far), all but the
            batches over all ranks.
        """
        with self.interval.waiting():
            loaded = [next(self.stream) for _ in range(self.split.accumulation_steps)]
        batches = [one.batch for one in loaded]
        unreadable = [error for one in loaded for error in one.unreadable]
        unfetched = [error for one in loaded for error in one.unfetched]
        first = self.ranks.rank % self.split.sequence_parallel == 0  # of the ranks that share these packs
        own = [Work.of(batch, self.config, common=first) for batch in batches]
        flags = (stop_requested, self.checkpoints.written, len(unreadable), len(unfetched))
        sums = self.ranks.sum([*map(sum, zip(*own, strict=True)), *flags])
        *work, stop, written, left_out, failed = sums
        if self.checkpoints.in_progress and written == self.ranks.world_size:
            with self.interval.stall():
                self.checkpoints.finish()
        if failed:  # these packs may be good, so they are not quarantined
            raise DataError(self.ranks.gather(unfetched)[0])
        quarantined = self.meta.quarantined + int(left_out) // self.split.sequence_parallel
        if left_out:
            self._quarantine(self.ranks.gather(unreadable), quarantined)
        return batches, Work(*work), stop > 0, quarantined

    def _quarantine(self, errors: list[str], quarantined: int) -> None:
        """Report the packs left out of a step, or fail if they exceed `data.quarantine`; all ranks decide alike."""
        allowed, times = self.config.data.quarantine, Counter(errors)
        if apart := [error for error, ranks in times.items() if ranks % self.split.sequence_parallel]:
            raise DataError(f"{apart[0]} (on some of the ranks that share it: they must read the same data)")
        if quarantined > allowed:
            beyond = f" ({quarantined} such packs, data.quarantine allows {allowed})" if allowed else ""
            raise DataError(errors[0] + beyond)
        if self.ranks.is_main:
            for error in times:
                say(f"quarantined: {error}")

    def _micro_step(self, batch: PackedBatch, counts: Counts, position: int) -> tuple[Tensor, Tensor]:
        """Run forward, backward and DeepSpeed's step, which updates the weights after the last micro-batch only.

        The position of the first pack in the run, and the part of the packs that this rank holds, key the dropout.
        """
        if self.config.model.transformer.dropout:
            key = (self.config.train.seed, position, self.ranks.rank % self.split.sequence_parallel)
            torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))
        batch = batch.to(self.ranks.device, non_blocking=True)
        losses = self.engine(batch, counts=counts)
        self.quarters.add(batch, losses.per_image)
        # A loss that is not finite may have a finite gradient. This makes the gradient NaN without waiting for the
        # device, and DeepSpeed then skips the step on all ranks.
        finite = torch.where(losses.total.detach().isfinite(), 1.0, math.nan)
        # The losses are divided by global counts already; DeepSpeed averages gradients over the ranks.
        self.engine.backward(losses.total * (finite * self.ranks.world_size), scale_wrt_gas=False)
        self.engine.step()
        return losses.text.detach(), losses.diffusion.detach()

    def _report_skipped(self, losses: list[tuple[Tensor, Tensor]]) -> None:
        """If DeepSpeed has skipped this step, count it and print why."""
        if self.engine.skipped_steps == self.meta.skipped_steps:
            self.skipped_in_a_row = 0
            return
        self.skipped_in_a_row += 1
        drop_gradients(self.engine)
        found = self.ranks.gather(self._non_finite(losses))
        if self.ranks.is_main:
            named = "; ".join(found[:_NAMED]) or "the gradient alone, of finite losses on all ranks"
            more = f"; and those of {len(found) - _NAMED} more micro-batches" if len(found) > _NAMED else ""
            print(f"step {self.meta.step + 1} is skipped: NaN or infinity in {named}{more}", flush=True)

    def _non_finite(self, losses: list[tuple[Tensor, Tensor]]) -> list[str]:
        """Return the losses of this rank's step that are not finite, one description for each micro-batch."""
        found, order = [], self.data.order(self.config.train.seed, self.config.data.shuffle_window)
        for positions, pair in zip(self.split.micro_batches(self.meta.packs_consumed), losses, strict=False):
            names = [name for name, loss in zip(("text", "diffusion"), pair, strict=True) if not math.isfinite(loss)]
            if names:
                packs = ", ".join(self.data.describe_pack(order[position][1]) for position in positions)
                found.append(f"the {' and '.join(names)} loss of rank {self.ranks.rank}, pack {packs}")
        return found

    def _report(self, losses: list[tuple[Tensor, Tensor]], lr: float) -> None:
        """Wait for the device, and log the row of this step. Collective."""
        own = [float(sum(part)) for part in zip(*losses, strict=True)]
        text, diffusion, *quarters = self.ranks.sum([*own, *self.quarters.pop()])
        waited, memory = self.ranks.max([self.interval.waited, peak_memory(self.ranks.device)])
        ended, self.interval = self.interval, Interval()
        seconds, work, devices = self.interval.start - ended.start, ended.work, self.ranks.world_size
        q1, q2, q3, q4 = mean_losses(quarters)
        row = Row(
            step=self.meta.step,
            packs=self.meta.packs_consumed,
            time=time.time(),
            loss=text + self.config.model.diffusion_weight * diffusion,
            text_loss=text,
            diffusion_loss=diffusion,
            diffusion_loss_q1=q1,
            diffusion_loss_q2=q2,
            diffusion_loss_q3=q3,
            diffusion_loss_q4=q4,
            lr=lr,
            grad_norm=float(self.engine.get_global_grad_norm()),
            tokens_per_second=work.tokens / seconds,
            tokens_per_second_per_device=work.tokens / seconds / devices,
            images_per_second=work.images / seconds,
            mfu=work.flops / seconds / self.peak if self.peak else None,
            padding=1 - work.tokens / work.positions,
            data_wait=waited / seconds,
            checkpoint_stall=ended.stalled / seconds,
            peak_memory_gb=memory / 1e9,
            skipped_steps=self.meta.skipped_steps,
            quarantined=self.meta.quarantined,
        )

        def log() -> None:
            for logger in self.loggers:
                logger.log(row)

        self.ranks.together(log)

    def _announce(self, checkpoint: Path | None) -> None:
        """Prepare the run folder, which holds this checkpoint, and print what is about to run."""
        config, data, meta, steps = self.config, self.data, self.meta, self.config.train.steps
        self.checkpoints.repair(checkpoint)  # its folder comes first, since it marks the run folder as one
        if meta.step >= steps:
            print(
                f"{self.folder}: trained to step {meta.step} already; give another train.output, and "
                "train.init_from to begin from these weights"
            )
            return
        write_data_description(self.folder, self.description)
        notes = resume_notes(self.folder, checkpoint, config) if checkpoint else []
        write_config(self.folder, config)
        for note in notes:
            print(note)
        parameters = sum(getattr(p, "ds_numel", p.numel()) for p in self.engine.module.parameters())
        print(
            f"{self.folder}: {parameters / 1e6:.2f}M parameters, {meta.precision}, {meta.world_size} x "
            f"{self.ranks.device.type}, {config.train.global_batch} packs of {data.sequence_length} a step in "
            f"{self.split.accumulation_steps} accumulation steps"
        )
        if config.optimizer.warmup_steps >= steps:
            warmup = f"optimizer.warmup_steps={config.optimizer.warmup_steps}"
            print(f"warning: {warmup} covers all {steps} steps; lower it to train at optimizer.lr")
        start = f"resuming at step {meta.step}" if meta.step else "training"
        backend = ops.describe(config.model.backend, self.ranks.device)
        print(f"{start}, {steps} steps, {data.num_packs} packs in {data}, {backend}", flush=True)


class StopRequest:
    """A handler that turns the signals that end jobs into a request to stop; a second SIGINT exits at once.

    A launcher answers Ctrl-C with a SIGTERM of its own, so that signal never counts as the second.
    """

    def __init__(self) -> None:
        self.requested = False
        self.interrupts = 0
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, self._handle)

    def _handle(self, number: int, _: FrameType | None) -> None:
        self.interrupts += number == signal.SIGINT
        if self.interrupts > 1:
            sys.exit(128 + number)
        self.requested = True
