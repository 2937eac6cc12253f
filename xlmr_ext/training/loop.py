"""The training loop: steps, evaluations, the best weights kept."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from xlmr_ext.chance import ChanceWarning, signs_of_chance
from xlmr_ext.data import LengthBatches, packed
from xlmr_ext.mapped_memory import give_back
from xlmr_ext.optim import adamw, clip_gradients, linear_schedule, set_rate, warmup_steps
from xlmr_ext.prediction import Evaluation
from xlmr_ext.training.divergence import stop_if_diverged
from xlmr_ext.training.meter import Meter
from xlmr_ext.training.records import EpochRecord, FinetuneResult
from xlmr_ext.training.state import set_generators
from xlmr_ext.training.tensors import restore_trained, trained_tensors

if TYPE_CHECKING:
    from xlmr_ext.optim import NarrowVocabulary
    from xlmr_ext.pretrained import PreTrainedModel
    from xlmr_ext.tasks.base import Features, Scores, Task
    from xlmr_ext.training.checkpoints import Checkpoints
    from xlmr_ext.training.log import StepLog
    from xlmr_ext.training.settings import Settings
    from xlmr_ext.training.state import StateFile

# From here on a rate can be too high; below it, a run that does not learn wants a higher one.
_LOW_RATE = 1e-5
# Writing the state may take as long as an epoch on few texts.
STATE_SECONDS = 300.0


@dataclass
class Position:
    """How far a run is, and what it has found: all of it that is no tensor.

    Args:
        epoch: the one under way, from 1; ``done`` of its steps are behind the run.
        loss_sum, examples: since the latest record.
        rate, gradient_norm: of the latest step; the head's rate, and the norm before clipping.
        waited: evaluations since the best one.
        seconds: that the run took; ``recorded`` of them are in records.
        best_step: of the best weights, 0 before the first.
    """

    epoch: int = 1
    done: int = 0
    losses: list[float] = field(default_factory=list)
    history: list[EpochRecord] = field(default_factory=list)
    loss_sum: float = 0.0
    examples: int = 0
    rate: float = 0.0
    gradient_norm: float = 0.0
    tokens: int = 0
    seconds: float = 0.0
    recorded: float = 0.0
    best_step: int = 0
    best_key: tuple[float, ...] | None = None
    waited: int = 0
    at_chance: bool = False
    warned: bool = False

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        return len(self.losses)

    def as_row(self) -> dict[str, Any]:
        """For JSON."""
        return {**vars(self), "history": [record.as_row() for record in self.history]}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Position:
        """From :meth:`as_row`."""
        history = [EpochRecord.from_row(record) for record in row["history"]]
        key = None if row["best_key"] is None else tuple(row["best_key"])
        return cls(**{**row, "history": history, "best_key": key})


@dataclass
class Loop:
    """One run: what `finetune` would otherwise keep in a dozen variables.

    Args:
        log_steps: steps from one line of the log to the next.
        state: where the state goes, every ``save_steps`` steps; None: at the end of an epoch, but
            not more often than every five minutes.
        keep_last: whether the last weights are saved beside the best ones.
    """

    model: PreTrainedModel
    task: Task
    settings: Settings
    checkpoints: Checkpoints
    narrow: NarrowVocabulary | None
    log: StepLog
    log_steps: int
    state: StateFile | None
    save_steps: int | None  # 0: never
    keep_last: bool
    progress: bool | None
    on_epoch: Callable[[EpochRecord], None] | None
    at: Position = field(default_factory=Position)
    steps_an_epoch: int = 0
    total: int = 0
    warmup: int = 0
    best_scores: Scores | None = None
    best_weights: dict[str, torch.Tensor] | None = None
    guessing_loss: float | None = None
    meter: Meter | None = None
    resumed_at: int = 0
    saved_at: float = 0.0  # seconds of the run, when the state was saved

    def train(
        self,
        data: Features,
        dev: Features | None,
        before: tuple[dict[str, Any], dict[str, torch.Tensor]] | None = None,
    ) -> FinetuneResult:
        """Trains to the end, from the beginning or from what :meth:`StateFile.load` gave."""
        settings = self.settings
        batches = LengthBatches(
            data.lengths(),
            settings.step_size,
            seed=settings.seed,
            bucket_batches=settings.bucket_batches,
        )
        self.steps_an_epoch = len(batches)
        self.total = settings.epochs * len(batches)
        self.warmup = warmup_steps(self.total, settings.warmup_ratio)
        self.guessing_loss = self.task.guessing_loss(data)
        optimizer = adamw(
            self.model, settings.learning_rate, settings.weight_decay, settings.layer_decay
        )
        if before is not None:
            self._restore(optimizer, *before)
        at = self.at
        started = time.monotonic() - at.seconds
        self.meter = Meter(self.total, at.step, self.progress)
        while at.epoch <= settings.epochs and not self._waited_enough():
            self.meter.name(f"epoch {at.epoch}/{settings.epochs}")
            self.model.train()
            for examples in batches.epoch(at.epoch)[at.done :]:
                self.meter.begin()
                self._step(optimizer, data, examples)
                at.done += 1
                at.seconds = time.monotonic() - started
                self._log_step()
                if self._is_recorded(at.done == self.steps_an_epoch):
                    self._record(dev, started)
                    self.model.train()
                    if self._waited_enough():
                        break
                self._save_state(optimizer)
            at.epoch, at.done = at.epoch + 1, 0
        return self._finish(dev, time.monotonic() - started)

    def beginning(self, data: Features, dev: Features | None) -> dict[str, Any]:
        """The first line of the log."""
        return {
            "task": self.task.name,
            "settings": asdict(self.settings),
            "labels": self.task.labels,
            "train_examples": len(data),
            "dev_examples": None if dev is None else len(dev),
        }

    def close(self) -> None:
        if self.meter is not None:
            self.meter.close()

    def where(self) -> str:
        epoch = min(self.at.epoch, self.settings.epochs)
        return (
            f"in epoch {epoch} of {self.settings.epochs}, after step {self.at.step} of {self.total}"
        )

    def _name(self, record: EpochRecord) -> str:
        """What messages call the weights of a record."""
        by_epoch = self.settings.eval_steps is None
        return f"epoch {record.epoch}" if by_epoch else f"step {record.step}"

    def _step(
        self, optimizer: torch.optim.Optimizer, data: Features, examples: Sequence[int]
    ) -> None:
        """One optimiser step, on batches one after the other whose gradients add up.

        Each counts by its share of what the mean loss is a mean over, so that the gradient is that
        of all examples as one batch.
        """
        at, settings, size = self.at, self.settings, self.settings.batch_size
        at.rate = settings.learning_rate * linear_schedule(at.step + 1, self.total, self.warmup)
        set_rate(optimizer, at.rate)
        parts = [examples[first : first + size] for first in range(0, len(examples), size)]
        items = [self.task.items([data.targets[e] for e in part]) for part in parts]
        value, tokens = 0.0, 0
        for part, count in zip(parts, items, strict=True):
            batch = packed(
                data.sequences,
                data.rows(part),
                pad_token_id=int(self.model.config.pad_token_id),
                device=self.model.device,
            )
            device = self.model.device.type
            with torch.autocast(device, torch.bfloat16, enabled=settings.bf16):
                loss = self.task.loss(
                    self.model, batch, [data.targets[example] for example in part]
                )
            if len(parts) > 1:
                loss = loss * (count / sum(items))
            value += float(loss.detach())
            self._check_finite("the loss", value, data, part)
            loss.backward()
            tokens += batch.input_ids.numel()
        norm = clip_gradients(optimizer, settings.max_grad_norm)
        self._check_finite("the gradient's norm", norm, data, examples)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if self.narrow is not None:
            self.narrow.step(optimizer)
        at.losses.append(value)
        at.loss_sum += value * len(examples)
        at.examples += len(examples)
        at.tokens += tokens
        at.gradient_norm = norm
        assert self.meter is not None
        self.meter.end(value, tokens)

    def _check_finite(
        self, what: str, value: float, data: Features, examples: Sequence[int]
    ) -> None:
        stop_if_diverged(
            what,
            value,
            batch=map(data.where, examples),
            where=self.where(),
            rate=self.at.rate,
            told=self.checkpoints.told(),
        )

    def _log_step(self) -> None:
        at = self.at
        if at.step % self.log_steps and at.step != self.total:
            return
        assert self.meter is not None
        latest = at.losses[-((at.step - 1) % self.log_steps + 1) :]
        self.log.write(
            "step",
            step=at.step,
            epoch=at.epoch,
            loss=sum(latest) / len(latest),
            learning_rate=at.rate,
            gradient_norm=at.gradient_norm,
            tokens=at.tokens,
            tokens_per_second=round(self.meter.tokens_per_second, 1),
            seconds=round(at.seconds, 3),
        )

    def _is_recorded(self, ends_epoch: bool) -> bool:
        """Whether an evaluation, or at least a record, is due after this step."""
        every = self.settings.eval_steps
        if every is None:
            return ends_epoch
        return self.at.step % every == 0 or self.at.step == self.total

    def _record(self, dev: Features | None, started: float) -> None:
        at = self.at
        scores = (
            None
            if dev is None
            else self.task.evaluate(self.model, dev, batch_size=2 * self.settings.batch_size)
        )
        at.seconds = time.monotonic() - started
        record = EpochRecord(
            epoch=at.epoch,
            step=at.step,
            train_loss=at.loss_sum / at.examples,
            learning_rate=at.rate,
            seconds=at.seconds - at.recorded,
            dev=None if scores is None else dict(scores.metrics),
        )
        at.loss_sum, at.examples, at.recorded = 0.0, 0, at.seconds
        at.history.append(record)
        is_best = at.best_key is None or scores is None or scores.key > at.best_key
        self.log.write(
            "evaluation" if dev is not None else "epoch", **record.as_row(), best=is_best
        )
        at.waited = 0 if is_best else at.waited + 1
        if is_best:
            self._keep(record, scores)
        if self.on_epoch is not None:
            with nullcontext() if self.narrow is None else self.narrow.shown_whole():
                self.on_epoch(record)
        self._check_chance(record, at.losses[self.warmup :][-self.steps_an_epoch :], scores)

    def _waited_enough(self) -> bool:
        patience = self.settings.early_stopping_patience
        return patience is not None and self.at.waited >= patience

    def _keep(self, record: EpochRecord, scores: Scores | None) -> None:
        """Makes the weights of now the best ones."""
        at = self.at
        at.best_step, at.best_key = at.step, None if scores is None else scores.key
        self.best_scores = scores
        if self.narrow is not None:
            self.narrow.settle_decay()
        self.best_weights = None
        self.checkpoints.save_best(self._name(record), self._log(record))
        if scores is not None and at.step < self.total:
            self.best_weights = self.checkpoints.best_weights() or self._trained_weights()

    def _trained_weights(self) -> dict[str, torch.Tensor]:
        """Copies of the weights of now."""
        return {
            name: parameter.detach().clone()
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }

    def _log(self, record: EpochRecord) -> dict[str, Any]:
        """What the log beside the weights of a record says."""
        return {
            "task": self.task.name,
            "settings": asdict(self.settings),
            "labels": self.task.labels,
            "epoch": record.epoch,
            "step": record.step,
            "history": [record.as_row() for record in self.at.history],
            "losses": self.at.losses,
        }

    def _save_state(self, optimizer: torch.optim.Optimizer) -> None:
        """At its time; not after the last step, as little is left to do then."""
        at = self.at
        due = (
            at.done == self.steps_an_epoch and at.seconds - self.saved_at >= STATE_SECONDS
            if self.save_steps is None
            else self.save_steps > 0 and at.step % self.save_steps == 0
        )
        if self.state is None or not due or at.step == self.total:
            return
        tensors = trained_tensors(self.model, optimizer)
        if at.best_step != at.step:  # else they are the weights of now
            tensors |= {f"best.{name}": value for name, value in (self.best_weights or {}).items()}
        facts = {
            "position": at.as_row(),
            "saved": self.checkpoints.saved,
            "log_bytes": self.log.flush(),
            "narrow": None if self.narrow is None else self.narrow.state(),
            "has_best": self.best_weights is not None,
        }
        self.state.save(at.step, facts, tensors)
        self.saved_at = at.seconds

    def _restore(
        self,
        optimizer: torch.optim.Optimizer,
        facts: Mapping[str, Any],
        tensors: dict[str, torch.Tensor],
    ) -> None:
        """Everything as :meth:`_save_state` found it."""
        self.at = Position.from_row(facts["position"])
        self.resumed_at, self.saved_at = self.at.step, self.at.seconds
        self.checkpoints.saved = facts["saved"]
        if self.narrow is not None:
            self.narrow.restore(facts["narrow"])
        set_generators(facts["generators"], tensors)
        parameters = dict(self.model.named_parameters())
        best = {name[5:]: tensors.pop(name) for name in [*tensors] if name.startswith("best.")}
        self.best_weights = {
            name: value.to(parameters[name].device) for name, value in best.items()
        } or None
        restore_trained(self.model, optimizer, tensors)
        if facts["has_best"] and self.best_weights is None:
            self.best_weights = self._trained_weights()
        self.log.write("resume", step=self.at.step)

    def _finish(self, dev: Features | None, seconds: float) -> FinetuneResult:
        at = self.at
        if self.keep_last:
            self.checkpoints.save_last(self._name(at.history[-1]), self._log(at.history[-1]))
        self._restore_best()
        best = next(record for record in at.history if record.step == at.best_step)
        if self.best_scores is None and dev is not None:
            # They were found before the run was continued: their details are in no state.
            self.best_scores = self.task.evaluate(
                self.model, dev, batch_size=2 * self.settings.batch_size
            )
        if not self.checkpoints.written:
            # Saved by the process before, whose end may have come in the middle of it.
            self.checkpoints.save_best(self._name(best), self._log(best))
        self.checkpoints.hand_over_table()
        result = FinetuneResult(
            history=at.history,
            losses=at.losses,
            best_epoch=best.epoch,
            best_step=at.best_step,
            steps=at.step,
            seconds=seconds,
            at_chance=at.at_chance,
            labels=self.task.labels,
            output_dir=self.checkpoints.directory,
            task=self.task.name,
            scores=self.best_scores,
            stopped_early=at.step < self.total,
            resumed_at=self.resumed_at,
        )
        self.log.write(
            "end", step=at.step, best_step=at.best_step, stopped_early=result.stopped_early
        )
        # The whole run's, where the one saved with the best weights ends with them.
        end = {
            "seconds": seconds,
            "at_chance": at.at_chance,
            "stopped_early": result.stopped_early,
            "run": None if self.state is None else self.state.identity.as_row(),
        }
        self.checkpoints.write_log({**self._log(best), "end": end})
        if self.state is not None:
            self.state.remove()
        return result

    def _restore_best(self) -> None:
        if self.best_weights is None or self.at.best_step == self.at.step:
            return
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, value in self.best_weights.items():
                parameters[name].copy_(value)
                give_back(value)
        if self.narrow is not None:
            self.narrow.forget_decay()

    def _check_chance(
        self, record: EpochRecord, losses: Sequence[float], scores: Scores | None
    ) -> None:
        """Warns once, from half of the steps on; ``losses`` are those of an epoch, warmed up.

        Evaluations by steps may come before there are as many: a few losses say little.
        """
        at = self.at
        few = self.settings.eval_steps is not None and len(losses) < self.steps_an_epoch
        if self.guessing_loss is None or not losses or few or 2 * at.step < self.total:
            return
        details = None if scores is None else scores.details
        evaluation = details if isinstance(details, Evaluation) else None
        signs = signs_of_chance(losses, self.guessing_loss, evaluation)
        at.at_chance = bool(signs)
        if signs and not at.warned:
            at.warned = True
            rate = self.settings.learning_rate
            change = "lower" if rate >= _LOW_RATE else "raise"
            warnings.warn(
                f"training sits at chance after {self._name(record)}: {'; '.join(signs)}. To "
                f"change it, {change} the learning rate (now {rate:g}), train for more epochs (now "
                f"{self.settings.epochs}), or try another seed (now {self.settings.seed})",
                ChanceWarning,
                stacklevel=5,
            )
