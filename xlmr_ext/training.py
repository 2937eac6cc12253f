"""Fine-tuning on any task: AdamW, linear warm-up and decay, clipping, the best epoch kept."""

from __future__ import annotations

import json
import math
import random
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

from xlmr_ext.chance import ChanceWarning, signs_of_chance
from xlmr_ext.data import LengthBatches, check_vocabulary, packed
from xlmr_ext.files import replace_files
from xlmr_ext.optim import NarrowVocabulary, linear_schedule, parameter_groups, warmup_steps
from xlmr_ext.prediction import Evaluation
from xlmr_ext.saving import (
    LOG_NAME,
    SaveError,
    interrupts_wait,
    prepare_folder,
    replace_checkpoint,
)
from xlmr_ext.tasks.registry import make_task, task_of_model

if TYPE_CHECKING:
    from xlmr_ext.pretrained import PreTrainedModel
    from xlmr_ext.tasks.base import Features, Scores, Task
    from xlmr_ext.tokenization import XLMRobertaTokenizer

__all__ = [
    "LOG_NAME",
    "EpochRecord",
    "FinetuneResult",
    "SaveError",
    "TrainingInterrupted",
    "finetune",
    "seed_everything",
]

# From here on a rate can be too high; below it, a run that does not learn wants a higher one.
_LOW_RATE = 1e-5


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C while training; the message says where training stopped and what was saved."""


@dataclass(frozen=True)
class EpochRecord:
    """One epoch of training.

    Args:
        epoch: counted from 1.
        step: optimiser steps done at its end.
        train_loss: mean loss in nats over the epoch's examples, dropout on.
        learning_rate: of the epoch's last step.
        seconds: duration, evaluation included.
        dev: the task's metrics on dev data, or None without any; see
            :class:`xlmr_ext.tasks.base.Scores`.
    """

    epoch: int
    step: int
    train_loss: float
    learning_rate: float
    seconds: float
    dev: dict[str, float] | None = None

    @property
    def dev_loss(self) -> float | None:
        """Mean loss on dev data in nats."""
        return None if self.dev is None else self.dev.get("loss")

    @property
    def dev_accuracy(self) -> float | None:
        """Share of dev examples answered right, where the task counts that."""
        return None if self.dev is None else self.dev.get("accuracy")

    @property
    def dev_macro_f1(self) -> float | None:
        """Macro F1 on dev data, of a classifier."""
        return None if self.dev is None else self.dev.get("macro_f1")

    def as_row(self) -> dict[str, Any]:
        """The fields as a flat dict; a dev metric ``f1`` is ``dev_f1``."""
        row = asdict(self)
        row.update((f"dev_{name}", value) for name, value in (row.pop("dev") or {}).items())
        return row


@dataclass(frozen=True)
class FinetuneResult:
    """What a fine-tuning run did.

    Args:
        losses: loss of every step.
        best_epoch: the epoch whose weights the model now has, and that was saved.
        at_chance: whether the run ended as good as guessing.
        labels: the model's labels by id; empty for a task without labels.
        task: the task's name.
        scores: of the best epoch on dev data, with details; None without dev data.
    """

    history: list[EpochRecord]
    losses: list[float]
    best_epoch: int
    steps: int
    seconds: float
    at_chance: bool
    labels: list[str]
    output_dir: Path | None
    task: str
    scores: Scores | None

    @property
    def best(self) -> EpochRecord:
        """The record of the best epoch."""
        return self.history[self.best_epoch - 1]


@dataclass(frozen=True)
class _Settings:
    epochs: int
    batch_size: int
    learning_rate: float
    warmup_ratio: float
    weight_decay: float
    max_grad_norm: float | None
    max_length: int
    seed: int
    bucket_batches: int

    def check(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 1), ("bucket_batches", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {type(value).__name__}")
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}")
        if not 0 <= self.warmup_ratio <= 1:
            raise ValueError(f"warmup_ratio must be from 0 to 1, got {self.warmup_ratio}")
        if not (self.weight_decay >= 0 and math.isfinite(self.weight_decay)):
            raise ValueError(f"weight_decay must be 0 or more, got {self.weight_decay}")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be above 0 or None, got {self.max_grad_norm}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be from 0 to 2**32 - 1, got {self.seed}")


def seed_everything(seed: int) -> None:
    """Seeds the global generators of Python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def finetune(
    model: PreTrainedModel,
    tokenizer: XLMRobertaTokenizer,
    train: Any,
    *,
    dev: Any = None,
    task: Task | None = None,
    output_dir: str | Path | None,
    epochs: int = 5,
    batch_size: int = 16,
    learning_rate: float = 5e-5,
    warmup_ratio: float = 0.1,
    weight_decay: float = 0.01,
    max_grad_norm: float | None = 1.0,
    max_length: int | None = None,
    seed: int = 42,
    bucket_batches: int = 1,
    narrow_vocabulary: bool = True,
    progress: bool | None = None,
    on_epoch: Callable[[EpochRecord], None] | None = None,
) -> FinetuneResult:
    """Fine-tunes a model on a task and keeps the best epoch.

    Which epoch is best is the task's to say, by its dev metrics (a classifier: highest macro F1,
    then accuracy); without dev data it is the last. The model is left in eval mode with the best
    epoch's weights, which are also in ``output_dir`` with the tokenizer and a log. Sets the global
    seeds of Python, numpy and torch; the same seed, data and thread count give the same weights.

    Args:
        model: its labels are used where they cover those of ``train``; a model with the
            default names ``LABEL_0`` ... takes the labels of ``train``, sorted.
        train: a file, or what the task takes: for a classifier
            :class:`xlmr_ext.data.LabelledTexts`, a file with columns ``text`` and ``label``, or
            (text, label) tuples.
        dev: the same, evaluated after every epoch.
        task: a task made on this model, where its options matter; None takes the one that the
            model's head is for, with its defaults.
        output_dir: directory of the checkpoint, made where it is missing; None saves nothing.
        learning_rate: the peak, reached after ``warmup_ratio`` of all steps; falls linearly
            to 0 at the end.
        weight_decay: on matrices only, not on biases and LayerNorm.
        max_grad_norm: the gradient of all parameters together is scaled down to this 2-norm;
            None does not clip.
        max_length: tokens that a text is cut to, or a window has; None: as many as the task
            usually has (128, question answering 384), where the model takes them. A given task
            has its own.
        bucket_batches: see :class:`xlmr_ext.data.LengthBatches`.
        narrow_vocabulary: train only the word-embedding rows that the data uses: the same
            result in less memory and time, see :class:`xlmr_ext.optim.NarrowVocabulary`.
        progress: show a progress bar; None shows it where stderr is a terminal.
        on_epoch: called with each epoch's record.

    Raises:
        TypeError: for a model whose class tells no task, where none is given.
        ValueError: for arguments out of range, data without rows or that the task cannot use,
            labels that the model does not have.
        ArithmeticError: where the loss or the gradient is not finite.
        SaveError: where a checkpoint could not be written.
        TrainingInterrupted: on Ctrl-C.

    Warns:
        ChanceWarning: once, where the run sits at chance after warm-up and half of its steps.
    """
    if task is None:
        task = make_task(task_of_model(model), model, tokenizer, max_length=max_length)
    elif max_length is not None:
        raise ValueError(f"max_length came with a task, which has its own, {task.max_length}")
    elif task.model is not model:
        raise ValueError("task was made on another model than the one to train")
    settings = _Settings(
        epochs,
        batch_size,
        learning_rate,
        warmup_ratio,
        weight_decay,
        max_grad_norm,
        task.max_length,
        seed,
        bucket_batches,
    )
    settings.check()
    train_data = task.load(train, "train")
    dev_data = None if dev is None else task.load(dev, "dev")
    task.settle(train_data)
    data = task.features(train_data, training=True)
    if not len(data):
        raise ValueError("train has no examples left to learn from")
    dev_features = None if dev_data is None else task.features(dev_data, training=False)
    del train_data, dev_data
    every = [data] if dev_features is None else [data, dev_features]
    check_vocabulary(
        chain.from_iterable(part.sequences for part in every), int(model.config.vocab_size)
    )
    directory = None if output_dir is None else prepare_folder(Path(output_dir))
    seed_everything(seed)

    narrow = None
    if narrow_vocabulary and NarrowVocabulary.applies(model):
        narrow = NarrowVocabulary(model, chain.from_iterable(part.sequences for part in every))
        for part in every:
            part.sequences = [narrow.ids(sequence) for sequence in part.sequences]

    with nullcontext() if narrow is None else narrow.installed():
        run = _Run(model, tokenizer, task, settings, directory, narrow, progress, on_epoch)
        try:
            return run.train(data, dev_features)
        except KeyboardInterrupt:
            raise TrainingInterrupted(f"stopped {run.where()}; {run.saved()}") from None
        finally:
            run.close()
            model.eval()


@dataclass
class _Run:
    """The state of one run: what `finetune` would otherwise keep in a dozen variables."""

    model: PreTrainedModel
    tokenizer: XLMRobertaTokenizer
    task: Task
    settings: _Settings
    directory: Path | None
    narrow: NarrowVocabulary | None
    progress: bool | None
    on_epoch: Callable[[EpochRecord], None] | None
    history: list[EpochRecord] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    epoch: int = 1
    total: int = 0
    best_epoch: int = 0
    best_scores: Scores | None = None
    best_weights: dict[str, torch.Tensor] | None = None
    saved_epoch: int = 0
    guessing_loss: float | None = None
    at_chance: bool = False
    warned: bool = False
    bar: tqdm[Any] | None = None

    def train(self, data: Features, dev: Features | None) -> FinetuneResult:
        settings = self.settings
        started = time.monotonic()
        batches = LengthBatches(
            data.lengths(),
            settings.batch_size,
            seed=settings.seed,
            bucket_batches=settings.bucket_batches,
        )
        self.total = settings.epochs * len(batches)
        warmup = warmup_steps(self.total, settings.warmup_ratio)
        self.guessing_loss = self.task.guessing_loss(data)
        optimizer = _adamw(self.model, settings)
        self.bar = tqdm(
            total=self.total,
            unit="step",
            disable=None if self.progress is None else not self.progress,
        )
        for self.epoch in range(1, settings.epochs + 1):
            epoch_started = time.monotonic()
            self.bar.set_description(f"epoch {self.epoch}/{settings.epochs}")
            self.model.train()
            weighted = 0.0
            rate = 0.0
            for examples in batches.epoch(self.epoch):
                rate = settings.learning_rate * linear_schedule(
                    len(self.losses) + 1, self.total, warmup
                )
                weighted += self._step(optimizer, rate, data, examples) * len(examples)
            scores = (
                None
                if dev is None
                else self.task.evaluate(self.model, dev, batch_size=2 * settings.batch_size)
            )
            record = EpochRecord(
                epoch=self.epoch,
                step=len(self.losses),
                train_loss=weighted / len(data),
                learning_rate=rate,
                seconds=time.monotonic() - epoch_started,
                dev=None if scores is None else dict(scores.metrics),
            )
            self.history.append(record)
            self._keep_if_best(scores)
            if self.on_epoch is not None:
                with nullcontext() if self.narrow is None else self.narrow.shown_whole():
                    self.on_epoch(record)
            self._check_chance(self.losses[warmup:][-len(batches) :], scores)
        self._restore_best()
        return FinetuneResult(
            history=self.history,
            losses=self.losses,
            best_epoch=self.best_epoch,
            steps=len(self.losses),
            seconds=time.monotonic() - started,
            at_chance=self.at_chance,
            labels=self.task.labels,
            output_dir=self.directory,
            task=self.task.name,
            scores=self.best_scores,
        )

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def where(self) -> str:
        return (
            f"in epoch {self.epoch} of {self.settings.epochs}, after step {len(self.losses)} "
            f"of {self.total}"
        )

    def saved(self) -> str:
        if self.saved_epoch == 0:
            return "nothing was saved"
        return f"{self.directory} holds the weights of epoch {self.saved_epoch}"

    def _step(
        self,
        optimizer: torch.optim.Optimizer,
        rate: float,
        data: Features,
        examples: Sequence[int],
    ) -> float:
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = packed(
            data.sequences,
            data.rows(examples),
            pad_token_id=int(self.model.config.pad_token_id),
            device=self.model.device,
        )
        loss = self.task.loss(self.model, batch, [data.targets[example] for example in examples])
        value = float(loss.detach())
        if not math.isfinite(value):
            raise ArithmeticError(self._diverged(f"the loss is {value}", rate))
        loss.backward()
        norm = float(
            torch.nn.utils.clip_grad_norm_(
                [p for group in optimizer.param_groups for p in group["params"]],
                self.settings.max_grad_norm or math.inf,
            )
        )
        if not math.isfinite(norm):
            raise ArithmeticError(self._diverged(f"the gradient's norm is {norm}", rate))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if self.narrow is not None:
            self.narrow.step(rate * self.settings.weight_decay)
        self.losses.append(value)
        if self.bar is not None:
            self.bar.update()
            self.bar.set_postfix(loss=f"{value:.3f}", refresh=False)
        return value

    def _diverged(self, what: str, rate: float) -> str:
        return (
            f"training diverged {self.where()}: {what} at a learning rate of {rate:.3g}; "
            f"lower the learning rate, or look for damaged weights; {self.saved()}"
        )

    def _keep_if_best(self, scores: Scores | None) -> None:
        best = self.best_scores
        if best is not None and scores is not None and scores.key <= best.key:
            return
        self.best_epoch, self.best_scores = self.epoch, scores
        if self.narrow is not None:
            self.narrow.update_whole()
        if scores is not None and self.epoch < self.settings.epochs:
            self.best_weights = {
                name: parameter.detach().clone()
                for name, parameter in self.model.named_parameters()
                if parameter.requires_grad
            }
        else:
            self.best_weights = None
        if self.directory is not None:
            self._save(self.directory)

    def _save(self, directory: Path) -> None:
        log = {
            "task": self.task.name,
            "settings": asdict(self.settings),
            "labels": self.task.labels,
            "epoch": self.epoch,
            "history": [record.as_row() for record in self.history],
            "losses": self.losses,
        }

        def write(folder: Path) -> None:
            self.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            text = json.dumps(log, indent=1, ensure_ascii=True)
            replace_files(folder, {LOG_NAME: lambda path: path.write_text(text, "utf-8")})

        # So that what Ctrl-C says of the weights that are saved is true.
        with interrupts_wait():
            try:
                with nullcontext() if self.narrow is None else self.narrow.made_whole():
                    replace_checkpoint(directory, write)
            except Exception as error:
                before = (
                    f"the weights of epoch {self.saved_epoch} are still there"
                    if self.saved_epoch
                    else "what was there before is unchanged"
                )
                reason = error.strerror if isinstance(error, OSError) and error.strerror else error
                raise SaveError(
                    f"could not save epoch {self.epoch} to {directory}: {reason}; {before}"
                ) from error
            self.saved_epoch = self.epoch

    def _restore_best(self) -> None:
        if self.best_weights is None or self.best_epoch == self.epoch:
            return
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, value in self.best_weights.items():
                parameters[name].copy_(value)
        if self.narrow is not None:
            self.narrow.forget_decay()

    def _check_chance(self, losses: Sequence[float], scores: Scores | None) -> None:
        """Warns once, from half of the steps on; ``losses`` are those of an epoch, warmed up."""
        if self.guessing_loss is None or not losses or 2 * len(self.losses) < self.total:
            return
        details = None if scores is None else scores.details
        evaluation = details if isinstance(details, Evaluation) else None
        signs = signs_of_chance(losses, self.guessing_loss, evaluation)
        self.at_chance = bool(signs)
        if signs and not self.warned:
            self.warned = True
            rate = self.settings.learning_rate
            change = "lower" if rate >= _LOW_RATE else "raise"
            warnings.warn(
                f"training sits at chance after epoch {self.epoch}: {'; '.join(signs)}. To change "
                f"it, {change} the learning rate (now {rate:g}), train for more epochs (now "
                f"{self.settings.epochs}), or try another seed (now {self.settings.seed})",
                ChanceWarning,
                stacklevel=4,
            )


def _adamw(model: PreTrainedModel, settings: _Settings) -> torch.optim.Optimizer:
    groups = parameter_groups(model, settings.weight_decay)
    if not groups:
        raise ValueError("the model has no parameter that requires a gradient")
    # One fused kernel a parameter; torch has it for these types on the CPU and on CUDA.
    fused = all(
        p.dtype in (torch.float32, torch.float64) and p.device.type in ("cpu", "cuda")
        for group in groups
        for p in group["params"]
    )
    return torch.optim.AdamW(groups, lr=settings.learning_rate, fused=fused)
