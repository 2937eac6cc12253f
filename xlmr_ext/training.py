"""Fine-tuning a classifier: AdamW, linear warm-up and decay, clipping, the best epoch kept."""

from __future__ import annotations

import json
import math
import random
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

from xlmr_ext.chance import ChanceWarning, guessing_loss, signs_of_chance
from xlmr_ext.data import (
    LabelledTexts,
    LengthBatches,
    check_vocabulary,
    encode,
    label_ids,
    label_list,
    packed,
    read_labelled,
)
from xlmr_ext.optim import NarrowVocabulary, linear_schedule, parameter_groups, warmup_steps
from xlmr_ext.prediction import Evaluation, check_max_length, classifier_labels, evaluate_ids

if TYPE_CHECKING:
    from xlmr_ext.heads import XLMRobertaForSequenceClassification
    from xlmr_ext.tokenization import XLMRobertaTokenizer

Labelled = LabelledTexts | str | Path | Iterable[tuple[str, str | int]]

LOG_NAME = "xlmr_ext_training.json"

# From here on a rate can be too high; below it, a run that does not learn wants a higher one.
_LOW_RATE = 1e-5


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C while training; the message says where training stopped and what was saved."""


class SaveError(RuntimeError):
    """A checkpoint could not be written; the one that was there before is untouched."""


@dataclass(frozen=True)
class EpochRecord:
    """One epoch of training; the dev fields are None without dev data.

    Args:
        epoch: counted from 1.
        step: optimiser steps done at its end.
        train_loss: mean cross entropy over the epoch's rows, in nats, dropout on.
        learning_rate: of the epoch's last step.
        seconds: duration, evaluation included.
    """

    epoch: int
    step: int
    train_loss: float
    learning_rate: float
    seconds: float
    dev_loss: float | None = None
    dev_accuracy: float | None = None
    dev_macro_f1: float | None = None


@dataclass(frozen=True)
class FinetuneResult:
    """What a fine-tuning run did.

    Args:
        losses: loss of every step.
        best_epoch: the epoch whose weights the model now has, and that was saved.
        at_chance: whether the run ended as good as guessing.
    """

    history: list[EpochRecord]
    losses: list[float]
    best_epoch: int
    steps: int
    seconds: float
    at_chance: bool
    labels: list[str]
    output_dir: Path | None

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
    model: XLMRobertaForSequenceClassification,
    tokenizer: XLMRobertaTokenizer,
    train: Labelled,
    *,
    dev: Labelled | None = None,
    output_dir: str | Path | None,
    epochs: int = 5,
    batch_size: int = 16,
    learning_rate: float = 5e-5,
    warmup_ratio: float = 0.1,
    weight_decay: float = 0.01,
    max_grad_norm: float | None = 1.0,
    max_length: int = 128,
    seed: int = 42,
    bucket_batches: int = 1,
    narrow_vocabulary: bool = True,
    progress: bool | None = None,
    on_epoch: Callable[[EpochRecord], None] | None = None,
) -> FinetuneResult:
    """Fine-tunes a single-label classifier and keeps the best epoch.

    The best epoch is the one with the highest dev macro F1, then accuracy; without dev data it
    is the last. The model is left in eval mode with the best epoch's weights, which are also in
    ``output_dir`` with the tokenizer and a log. Sets the global seeds of Python, numpy and
    torch; the same seed, data and thread count give the same weights.

    Args:
        model: its labels are used where they cover those of ``train``; a model with the
            default names ``LABEL_0`` ... takes the sorted labels of ``train``.
        train: :class:`LabelledTexts`, a file with columns ``text`` and ``label``, or
            (text, label) tuples.
        dev: the same, evaluated after every epoch.
        output_dir: directory of the checkpoint, made where it is missing; None saves nothing.
        learning_rate: the peak, reached after ``warmup_ratio`` of all steps; falls linearly
            to 0 at the end.
        weight_decay: on matrices only, not on biases and LayerNorm.
        max_grad_norm: the gradient of all parameters together is scaled down to this 2-norm;
            None does not clip.
        max_length: tokens a text is cut to.
        bucket_batches: see :class:`xlmr_ext.data.LengthBatches`.
        narrow_vocabulary: train only the word-embedding rows that the data uses: the same
            result in less memory and time, see :class:`xlmr_ext.optim.NarrowVocabulary`.
        progress: show a progress bar; None shows it where stderr is a terminal.
        on_epoch: called with each epoch's record.

    Raises:
        ValueError: for arguments out of range, data with one class or none, labels that the
            model does not have.
        ArithmeticError: where the loss or the gradient is not finite.
        SaveError: where a checkpoint could not be written.
        TrainingInterrupted: on Ctrl-C.

    Warns:
        ChanceWarning: once, where the run sits at chance after warm-up and half of its steps.
    """
    settings = _Settings(
        epochs,
        batch_size,
        learning_rate,
        warmup_ratio,
        weight_decay,
        max_grad_norm,
        check_max_length(model, max_length),
        seed,
        bucket_batches,
    )
    settings.check()
    train_data = _labelled(train, "train")
    dev_data = None if dev is None else _labelled(dev, "dev")
    distinct = label_list(train_data.labels)
    if len(distinct) < 2:
        raise ValueError(
            f"{train_data.source} has one class only, {distinct[0]!r}: "
            "a classifier needs rows of at least 2"
        )
    labels = _settle_labels(model, train_data, distinct)
    train_ids = label_ids(train_data, labels)
    dev_ids = [] if dev_data is None else label_ids(dev_data, labels)

    directory = None if output_dir is None else _prepared(Path(output_dir))
    seed_everything(seed)

    train_sequences = encode(
        tokenizer, train_data.texts, train_data.pairs, max_length=settings.max_length
    )
    dev_sequences = (
        None
        if dev_data is None
        else encode(tokenizer, dev_data.texts, dev_data.pairs, max_length=settings.max_length)
    )
    check_vocabulary(train_sequences + (dev_sequences or []), int(model.config.vocab_size))
    narrow = None
    if narrow_vocabulary and NarrowVocabulary.applies(model):
        narrow = NarrowVocabulary(model, train_sequences + (dev_sequences or []))
        train_sequences = [narrow.ids(sequence) for sequence in train_sequences]
        if dev_sequences is not None:
            dev_sequences = [narrow.ids(sequence) for sequence in dev_sequences]

    with nullcontext() if narrow is None else narrow.installed():
        run = _Run(model, tokenizer, settings, labels, directory, narrow, progress, on_epoch)
        try:
            return run.train(train_sequences, train_ids, dev_sequences, dev_ids)
        except KeyboardInterrupt:
            raise TrainingInterrupted(f"stopped {run.where()}; {run.saved()}") from None
        finally:
            run.close()
            model.eval()


@dataclass
class _Run:
    """The state of one run: what `finetune` would otherwise keep in a dozen variables."""

    model: XLMRobertaForSequenceClassification
    tokenizer: XLMRobertaTokenizer
    settings: _Settings
    labels: list[str]
    directory: Path | None
    narrow: NarrowVocabulary | None
    progress: bool | None
    on_epoch: Callable[[EpochRecord], None] | None
    history: list[EpochRecord] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    epoch: int = 1
    total: int = 0
    best_epoch: int = 0
    saved_epoch: int = 0
    best_weights: dict[str, torch.Tensor] | None = None
    guessing_loss: float = math.nan
    at_chance: bool = False
    warned: bool = False
    bar: tqdm[Any] | None = None

    def train(
        self,
        sequences: list[list[int]],
        gold: list[int],
        dev_sequences: list[list[int]] | None,
        dev_gold: list[int],
    ) -> FinetuneResult:
        settings = self.settings
        started = time.monotonic()
        batches = LengthBatches(
            [len(ids) for ids in sequences],
            settings.batch_size,
            seed=settings.seed,
            bucket_batches=settings.bucket_batches,
        )
        self.total = settings.epochs * len(batches)
        warmup = warmup_steps(self.total, settings.warmup_ratio)
        self.guessing_loss = guessing_loss(gold)
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
            for rows in batches.epoch(self.epoch):
                rate = settings.learning_rate * linear_schedule(
                    len(self.losses) + 1, self.total, warmup
                )
                loss = self._step(optimizer, rate, sequences, gold, rows)
                weighted += loss * len(rows)
            evaluation = self._evaluate(dev_sequences, dev_gold)
            record = EpochRecord(
                epoch=self.epoch,
                step=len(self.losses),
                train_loss=weighted / len(sequences),
                learning_rate=rate,
                seconds=time.monotonic() - epoch_started,
                dev_loss=None if evaluation is None else evaluation.loss,
                dev_accuracy=None if evaluation is None else evaluation.accuracy,
                dev_macro_f1=None if evaluation is None else evaluation.macro_f1,
            )
            self.history.append(record)
            self._keep_if_best(record)
            if self.on_epoch is not None:
                with nullcontext() if self.narrow is None else self.narrow.shown_whole():
                    self.on_epoch(record)
            self._check_chance(self.losses[warmup:][-len(batches) :], evaluation)
        self._restore_best()
        return FinetuneResult(
            history=self.history,
            losses=self.losses,
            best_epoch=self.best_epoch,
            steps=len(self.losses),
            seconds=time.monotonic() - started,
            at_chance=self.at_chance,
            labels=self.labels,
            output_dir=self.directory,
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
        sequences: Sequence[Sequence[int]],
        gold: Sequence[int],
        rows: Sequence[int],
    ) -> float:
        for group in optimizer.param_groups:
            group["lr"] = rate
        device = self.model.device
        batch = packed(
            sequences, rows, pad_token_id=int(self.model.config.pad_token_id), device=device
        )
        target = torch.tensor([gold[row] for row in rows], dtype=torch.int64, device=device)
        loss = self.model(packed=batch, labels=target).loss
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

    def _evaluate(
        self, sequences: list[list[int]] | None, gold: Sequence[int]
    ) -> Evaluation | None:
        if sequences is None:
            return None
        return evaluate_ids(
            self.model, sequences, gold, self.labels, batch_size=2 * self.settings.batch_size
        )

    def _keep_if_best(self, record: EpochRecord) -> None:
        if self.best_epoch and record.dev_macro_f1 is not None:
            best = self.history[self.best_epoch - 1]
            if (record.dev_macro_f1, record.dev_accuracy or 0.0) <= (
                best.dev_macro_f1 or 0.0,
                best.dev_accuracy or 0.0,
            ):
                return
        self.best_epoch = record.epoch
        if self.narrow is not None:
            self.narrow.update_whole()
        last = record.epoch == self.settings.epochs
        if record.dev_macro_f1 is not None and not last:
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
            "settings": asdict(self.settings),
            "labels": self.labels,
            "epoch": self.epoch,
            "history": [asdict(record) for record in self.history],
            "losses": self.losses,
        }
        try:
            with nullcontext() if self.narrow is None else self.narrow.made_whole():
                _save_checkpoint(self.model, self.tokenizer, log, directory)
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

    def _check_chance(self, losses: Sequence[float], evaluation: Evaluation | None) -> None:
        """Warns once, from half of the steps on; ``losses`` are those of an epoch, warmed up."""
        if not losses or 2 * len(self.losses) < self.total:
            return
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


def _labelled(data: Labelled, name: str) -> LabelledTexts:
    if isinstance(data, str | Path):
        data = read_labelled(data)
    elif not isinstance(data, LabelledTexts):
        data = LabelledTexts.of(data, source=name)
    if not len(data):
        raise ValueError(f"{name} has no rows")
    return data


def _settle_labels(
    model: XLMRobertaForSequenceClassification, train: LabelledTexts, distinct: list[str]
) -> list[str]:
    """The label names by id; gives the model those of the data where its own are placeholders."""
    names = classifier_labels(model)
    if set(distinct) <= set(names) or names != [f"LABEL_{i}" for i in range(len(names))]:
        return names
    numbers = [str(number) for number in range(len(names))]
    if set(distinct) <= set(numbers):
        chosen = numbers
    elif len(distinct) == len(names):
        chosen = distinct
    else:
        raise ValueError(
            f"{train.source} has {len(distinct)} labels and the model {len(names)}: load the "
            f"model with num_labels={len(distinct)}"
        )
    model.config.id2label = dict(enumerate(chosen))
    model.config.label2id = {label: index for index, label in enumerate(chosen)}
    return chosen


def _adamw(
    model: XLMRobertaForSequenceClassification, settings: _Settings
) -> torch.optim.Optimizer:
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


def _prepared(directory: Path) -> Path:
    """Makes the directory and writes to it once, so that a bad one is found before training."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise SaveError(
            f"cannot write to the output directory {directory}: {error.strerror}"
        ) from error
    return directory


def _save_checkpoint(
    model: XLMRobertaForSequenceClassification,
    tokenizer: XLMRobertaTokenizer,
    log: dict[str, Any],
    directory: Path,
) -> None:
    """Writes everything beside the old files, then renames: a full disk costs none of them."""
    fresh = Path(tempfile.mkdtemp(prefix=".saving-", dir=directory))
    try:
        model.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
        text = json.dumps(log, indent=1, ensure_ascii=True)
        (fresh / LOG_NAME).write_text(text, encoding="utf-8")
        for path in sorted(fresh.iterdir()):
            path.replace(directory / path.name)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
