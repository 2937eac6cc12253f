"""The loop of continued pre-training: blocks drawn, masked and learnt, evaluated on fixed masks."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from xlmr_ext.corpus.blocks import Block, blocks_in
from xlmr_ext.losses import IGNORED
from xlmr_ext.optim import adamw, clip_gradients, linear_schedule, set_rate, warmup_steps
from xlmr_ext.packing import PackedBatch
from xlmr_ext.prediction import in_eval_mode
from xlmr_ext.tasks.masked import MaskingCollator
from xlmr_ext.training.divergence import stop_if_diverged
from xlmr_ext.training.meter import Meter
from xlmr_ext.training.records import EpochRecord
from xlmr_ext.training.state import set_generators
from xlmr_ext.training.tensors import restore_trained, trained_tensors

if TYPE_CHECKING:
    from xlmr_ext.corpus.files import Corpus
    from xlmr_ext.corpus.mixture import Mixture
    from xlmr_ext.masked_lm import XLMRobertaForMaskedLM
    from xlmr_ext.training.checkpoints import Checkpoints
    from xlmr_ext.training.log import StepLog
    from xlmr_ext.training.pretraining_settings import PretrainSettings
    from xlmr_ext.training.state import StateFile

# Of the masks that every run is evaluated on, whatever its own seed.
EVALUATION_SEED = 0
_GENERATOR = "masking.generator"


@dataclass
class Progress:
    """How far a run is: all of it that is no tensor.

    Args:
        loss_sum, labels: of the tokens learnt since the latest record.
        unlogged: losses of the steps since the latest line of the log.
        rate, gradient_norm: of the latest step; the norm before clipping.
        seconds: that the run took; ``recorded`` of them are in records.
        drawn: blocks of each language.
        before: the metrics on dev text of the model as it came.
    """

    step: int = 0
    tokens: int = 0
    loss_sum: float = 0.0
    labels: int = 0
    unlogged: list[float] = field(default_factory=list)
    rate: float = 0.0
    gradient_norm: float = 0.0
    seconds: float = 0.0
    recorded: float = 0.0
    drawn: dict[str, int] = field(default_factory=dict)
    before: dict[str, float] | None = None
    history: list[EpochRecord] = field(default_factory=list)

    def as_row(self) -> dict[str, Any]:
        """For JSON."""
        return {**vars(self), "history": [record.as_row() for record in self.history]}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Progress:
        """From :meth:`as_row`."""
        history = [EpochRecord.from_row(record) for record in row["history"]]
        return cls(**{**row, "history": history})


@dataclass
class PretrainingLoop:
    """One run.

    Args:
        total: steps; ``steps_an_epoch`` of them draw as many blocks as the corpus has.
        log_steps, save_steps: steps from one line of the log, or state and checkpoint, to the next.
    """

    model: XLMRobertaForMaskedLM
    collator: MaskingCollator
    settings: PretrainSettings
    corpus: Corpus
    mixture: Mixture
    dev: Corpus | None
    total: int
    steps_an_epoch: float
    checkpoints: Checkpoints
    log: StepLog
    log_steps: int
    state: StateFile | None
    save_steps: int  # 0: never
    eval_steps: int | None
    progress: bool | None
    on_record: Callable[[EpochRecord], None] | None
    at: Progress = field(default_factory=Progress)
    meter: Meter | None = None

    def train(self, before: tuple[dict[str, Any], dict[str, Tensor]] | None) -> None:
        """Trains to the end, from the beginning or from what :meth:`StateFile.load` gave."""
        settings = self.settings
        warmup = warmup_steps(self.total, settings.warmup_ratio)
        optimizer = adamw(self.model, settings.learning_rate, settings.weight_decay, 1.0)
        if before is not None:
            self._restore(optimizer, *before)
        at = self.at
        started = time.monotonic() - at.seconds
        if not at.step and self.dev is not None:
            at.before = self._evaluate(self.dev)
            self.log.write("evaluation", step=0, **_as_dev(at.before))
        self.meter = Meter(self.total, at.step, self.progress)
        self.meter.name("pretrain")
        self.model.train()
        while at.step < self.total:
            self.meter.begin()
            at.rate = settings.learning_rate * linear_schedule(at.step + 1, self.total, warmup)
            set_rate(optimizer, at.rate)
            self._step(optimizer)
            at.seconds = time.monotonic() - started
            self._log_step()
            every = self.eval_steps
            if at.step == self.total or (every is not None and at.step % every == 0):
                self._record(started)
            self._save(optimizer)

    def where(self) -> str:
        return f"after step {self.at.step} of {self.total}"

    def close(self) -> None:
        if self.meter is not None:
            self.meter.close()
        self.mixture.close()

    def summary(self) -> dict[str, Any]:
        """What the log beside the weights says."""
        return {
            "task": "masked-lm",
            "settings": asdict(self.settings),
            "step": self.at.step,
            "steps": self.total,
            "tokens": self.at.tokens,
            "shares": self.mixture.shares,
            "drawn": self.at.drawn,
            "before": self.at.before,
            "history": [record.as_row() for record in self.at.history],
        }

    def _step(self, optimizer: torch.optim.Optimizer) -> None:
        """One optimiser step, on batches one after the other whose gradients add up to that of
        the mean loss over all their labels."""
        at, settings = self.at, self.settings
        drawn = self.mixture.draw(settings.step_size)
        blocks = [block for _, block in drawn]
        parts = [
            blocks[n : n + settings.batch_size] for n in range(0, len(blocks), settings.batch_size)
        ]
        batches = [self._batch(part, self.collator) for part in parts]
        # Short lines may leave nothing drawn: then there is nothing to learn, and no gradient.
        labels = sum(count for *_, count in batches)
        value = 0.0
        for part, (batch, targets, _) in zip(parts, batches, strict=True):
            loss = self.model(packed=batch, labels=targets, num_items_in_batch=max(1, labels)).loss
            value += float(loss.detach())
            self._check_finite("the loss", value, part, self.corpus)
            loss.backward()
        norm = clip_gradients(optimizer, settings.max_grad_norm)
        self._check_finite("the gradient's norm", norm, blocks, self.corpus)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens = sum(len(block.ids) for block in blocks)
        at.step += 1
        at.tokens += tokens
        at.loss_sum += value * labels
        at.labels += labels
        at.unlogged.append(value)
        at.gradient_norm = norm
        for language, _ in drawn:
            at.drawn[language] = at.drawn.get(language, 0) + 1
        assert self.meter is not None
        self.meter.end(value, tokens)

    def _batch(
        self, blocks: Sequence[Block], collator: MaskingCollator
    ) -> tuple[PackedBatch, Tensor, int]:
        """Blocks masked, their labels [N], and how many count."""
        masked, labels = collator.mask(torch.tensor([t for block in blocks for t in block.ids]))
        device = self.model.device
        batch = PackedBatch.from_sequences(
            masked.split([len(block.ids) for block in blocks]),
            pad_token_id=int(self.model.config.pad_token_id),
            device=device,
        )
        return batch, labels.to(device), int((labels != IGNORED).sum())

    def _check_finite(
        self, what: str, value: float, blocks: Sequence[Block], corpus: Corpus
    ) -> None:
        stop_if_diverged(
            what,
            value,
            batch=(f"{corpus.where(block.file)}:{block.line}" for block in blocks),
            where=self.where(),
            rate=self.at.rate,
            told=self.checkpoints.told(),
        )

    def _evaluate(self, dev: Corpus) -> dict[str, float]:
        """Loss in nats and perplexity over the masked tokens, and the loss of each language."""
        size = 2 * self.settings.batch_size
        sums: dict[str, float] = {}
        counts: dict[str, int] = {}
        collator = MaskingCollator(
            self.collator.tokenizer, self.settings.mlm_probability, seed=EVALUATION_SEED
        )
        with in_eval_mode(self.model):
            for language in dev.languages:
                blocks = blocks_in(dev, self.collator.tokenizer, language, self.settings.max_length)
                total, labelled = 0.0, 0
                for part in _parts(blocks, size):
                    batch, labels, count = self._batch(part, collator)
                    loss = self.model(
                        packed=batch, labels=labels, num_items_in_batch=1, output_logits=False
                    ).loss
                    self._check_finite("the loss", float(loss), part, dev)
                    total, labelled = total + float(loss), labelled + count
                sums[language], counts[language] = total, labelled
        loss = sum(sums.values()) / max(1, sum(counts.values()))
        metrics = {"loss": loss, "perplexity": _perplexity(loss)}
        if len(sums) > 1:
            metrics |= {f"loss_{name}": sums[name] / max(1, counts[name]) for name in sums}
        return metrics

    def _log_step(self) -> None:
        at = self.at
        if at.step % self.log_steps and at.step != self.total:
            return
        assert self.meter is not None
        self.log.write(
            "step",
            step=at.step,
            loss=sum(at.unlogged) / len(at.unlogged),
            learning_rate=at.rate,
            gradient_norm=at.gradient_norm,
            tokens=at.tokens,
            tokens_per_second=round(self.meter.tokens_per_second, 1),
            seconds=round(at.seconds, 3),
        )
        at.unlogged = []

    def _record(self, started: float) -> None:
        at = self.at
        metrics = None if self.dev is None else self._evaluate(self.dev)
        at.seconds = time.monotonic() - started
        record = EpochRecord(
            epoch=math.ceil(at.step / self.steps_an_epoch),
            step=at.step,
            train_loss=at.loss_sum / max(1, at.labels),
            learning_rate=at.rate,
            seconds=at.seconds - at.recorded,
            dev=metrics,
        )
        at.loss_sum, at.labels, at.recorded = 0.0, 0, at.seconds
        at.history.append(record)
        self.log.write("evaluation", **record.as_row())
        if self.on_record is not None:
            self.on_record(record)

    def _save(self, optimizer: torch.optim.Optimizer) -> None:
        """Weights and then the state at their time; at the end the weights alone."""
        at = self.at
        is_last = at.step == self.total
        if not is_last and (not self.save_steps or at.step % self.save_steps):
            return
        self.checkpoints.save_best(f"step {at.step}", self.summary())
        if is_last or self.state is None:
            return
        drawn, waiting = self.mixture.state()
        facts = {
            "progress": at.as_row(),
            "saved": self.checkpoints.saved,
            "log_bytes": self.log.flush(),
            "mixture": drawn,
        }
        generator = {_GENERATOR: self.collator.generator.get_state()}
        self.state.save(
            at.step, facts, {**trained_tensors(self.model, optimizer), **waiting, **generator}
        )

    def _restore(
        self,
        optimizer: torch.optim.Optimizer,
        facts: Mapping[str, Any],
        tensors: dict[str, Tensor],
    ) -> None:
        """Everything as :meth:`_save` found it."""
        self.at = Progress.from_row(facts["progress"])
        self.checkpoints.saved = facts["saved"]
        set_generators(facts["generators"], tensors)
        self.collator.generator.set_state(tensors.pop(_GENERATOR))
        self.mixture.restore(facts["mixture"], tensors)
        restore_trained(self.model, optimizer, tensors)
        self.log.write("resume", step=self.at.step)


def _as_dev(metrics: Mapping[str, float]) -> dict[str, float]:
    return {f"dev_{name}": value for name, value in metrics.items()}


def _perplexity(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _parts(blocks: Iterator[Block], size: int) -> Iterator[list[Block]]:
    while part := list(islice(blocks, size)):
        yield part
