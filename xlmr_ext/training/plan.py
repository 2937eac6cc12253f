"""What a run will take: its peak of resident memory and its time, before it starts.

What depends on the model and the recipe alone is counted: weights, gradients, AdamW's moments. What
depends on the machine is measured, on a few batches of the run itself: what a step needs beside
those, and how long it takes. No weight changes and nothing is written.
"""

from __future__ import annotations

import copy
import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from xlmr_ext.data import LengthBatches, packed
from xlmr_ext.mapped_memory import give_back, peak_memory, resident_bytes, resident_memory
from xlmr_ext.optim import NarrowVocabulary, word_embeddings
from xlmr_ext.tasks.registry import make_task, task_of_model
from xlmr_ext.training.features import read_features
from xlmr_ext.training.settings import check_count
from xlmr_ext.training.thrift import check_thrift, thrift

if TYPE_CHECKING:
    from xlmr_ext.pretrained import PreTrainedModel
    from xlmr_ext.tasks.base import Features, Task
    from xlmr_ext.tokenization import XLMRobertaTokenizer

_MEASURED_ELEMENTS = 1 << 21  # of AdamW
_WRITTEN_BYTES = 1 << 24
_TIMES = 2  # a batch is run so many times, the quickest counts


@dataclass(frozen=True)
class FinetunePlan:
    """What a run will take.

    Args:
        memory: bytes by what they are for, at the peak; they add up to ``peak_bytes``.
        peak_at: ``training``, ``evaluation`` or ``end``, where the peak is.
        seconds: by what they are for; a run whose weights get better at every evaluation writes as
            often as it evaluates.
        steps: optimiser steps of all epochs; ``tokens`` of all of them, ``largest_batch`` tokens of
            the largest batch.
        trained, parameters: numbers of parameters; of a narrow vocabulary its rows count alone.
    """

    memory: dict[str, int]
    peak_at: str
    seconds: dict[str, float]
    steps: int
    tokens: int
    largest_batch: int
    trained: int
    parameters: int
    evaluations: int

    @property
    def peak_bytes(self) -> int:
        return sum(self.memory.values())

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())

    def as_row(self) -> dict[str, Any]:
        """For JSON."""
        return {
            **asdict(self),
            "peak_bytes": self.peak_bytes,
            "total_seconds": round(self.total_seconds, 3),
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
        }

    def table(self) -> str:
        """For a reader."""
        lines = [f"memory at the peak, in {self.peak_at}"]
        rows = [*self.memory.items(), ("in all", self.peak_bytes)]
        lines += [f"  {name:<44}{size / 1e6:>10,.0f} MB" for name, size in rows]
        lines.append(f"time, {self.steps} steps of {self.tokens:,} tokens in all")
        times = [*self.seconds.items(), ("in all", self.total_seconds)]
        lines += [f"  {name:<44}{_duration(value):>13}" for name, value in times]
        lines.append(
            f"{self.trained:,} of {self.parameters:,} parameters are trained; the largest batch "
            f"has {self.largest_batch:,} tokens"
        )
        return "\n".join(lines)


def finetune_plan(
    model: PreTrainedModel,
    tokenizer: XLMRobertaTokenizer,
    train: Any,
    *,
    dev: Any = None,
    task: Task | None = None,
    output_dir: str | Path | None,
    epochs: int = 5,
    batch_size: int = 16,
    gradient_accumulation_steps: int = 1,
    max_length: int | None = None,
    seed: int = 42,
    bucket_batches: int = 1,
    bf16: bool = False,
    narrow_vocabulary: bool = True,
    gradient_checkpointing: bool | int = False,
    freeze_embeddings: bool = False,
    freeze_layers: int = 0,
    eval_steps: int | None = None,
) -> FinetunePlan:
    """What :func:`xlmr_ext.training.finetune` with the same arguments will take, in this process.

    Runs forward and backward of three batches of the run, the largest among them. The model, its
    weights and the generators are afterwards as they were; nothing stays on the disk.

    Raises:
        TypeError, ValueError: as ``finetune``.
    """
    if task is None:
        task = make_task(task_of_model(model), model, tokenizer, max_length=max_length)
    check_thrift(model, gradient_checkpointing, freeze_embeddings, freeze_layers)
    sizes = {
        "epochs": epochs,
        "batch_size": batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps,
    }
    for name, value in sizes.items():
        check_count(name, value)
    before = copy.deepcopy((model.config.id2label, model.config.label2id))
    was_training = model.training
    generator = torch.get_rng_state()
    try:
        data, dev_features = read_features(model, task, train, dev)
        batches = LengthBatches(
            data.lengths(),
            batch_size * gradient_accumulation_steps,
            seed=seed,
            bucket_batches=bucket_batches,
        )
        parts = [
            step[first : first + batch_size]
            for epoch in range(1, epochs + 1)
            for step in batches.epoch(epoch)
            for first in range(0, len(step), batch_size)
        ]
        with thrift(model, gradient_checkpointing, freeze_embeddings, freeze_layers):
            return _plan(
                model,
                task,
                data,
                dev_features,
                parts,
                steps=epochs * len(batches),
                evaluations=(
                    epochs if eval_steps is None else -(-epochs * len(batches) // eval_steps)
                ),
                bf16=bf16,
                directory=None if output_dir is None else Path(output_dir),
                narrows=narrow_vocabulary and NarrowVocabulary.applies(model),
            )
    finally:
        model.config.id2label, model.config.label2id = before
        model.zero_grad(set_to_none=True)
        model.train(was_training)
        torch.set_rng_state(generator)


def _plan(
    model: PreTrainedModel,
    task: Task,
    data: Features,
    dev: Features | None,
    parts: Sequence[Sequence[int]],
    *,
    steps: int,
    evaluations: int,
    bf16: bool,
    directory: Path | None,
    narrows: bool,
) -> FinetunePlan:
    lengths = np.asarray(data.lengths())
    tokens = np.asarray([int(lengths[list(part)].sum()) for part in parts])
    every = [data.sequences] if dev is None else [data.sequences, dev.sequences]
    whole = [*model.parameters()]
    table: Any = None
    if narrows:
        table = word_embeddings(model).weight
    used = _used_rows(every)
    narrow = None
    if narrows:
        narrow = NarrowVocabulary(model, chain.from_iterable(every))
        data = copy.copy(data)
        data.sequences = [narrow.ids(sequence) for sequence in data.sequences]
    with nullcontext() if narrow is None else narrow.installed():
        trained = [p for p in model.parameters() if p.requires_grad]
        for parameter in whole:
            give_back(parameter)
        own = sum(resident_bytes(p) for p in {*whole, *model.parameters()})
        base = resident_memory() - own
        order = np.argsort(tokens, kind="stable")
        chosen = sorted({int(order[0]), int(order[len(order) // 2]), int(order[-1])})
        chosen.sort(key=lambda index: -tokens[index])
        timed: list[tuple[int, float]] = []
        model.train()
        with peak_memory() as peak:
            for index in chosen:
                taken = _time_of_step(model, task, data, parts[index], bf16)
                timed.append((int(tokens[index]), taken))
        weights = sum(_bytes(p) for p in model.parameters() if p.requires_grad)
        gradients = sum(_bytes(p) for p in trained)
        # Mapped weights that are not trained: the parts of a table that are looked at.
        still = sum(
            _touched(p, used)
            if p.shape[0] == model.config.vocab_size and p.ndim == 2
            else _bytes(p)
            for p in model.parameters()
            if not p.requires_grad
        )
        present = sum(resident_bytes(p) for p in {*whole, *model.parameters()})
        model.zero_grad(set_to_none=True)
        activations = max(0, peak.bytes - base - present - gradients)
        # A dev batch has twice the rows, and no gradients beside it.
        answering, eval_peak = 0.0, 0
        if dev is not None:
            answering, eval_peak = _evaluation(model, data, tokens, parts, chosen[0])
            answering *= sum(map(len, dev.sequences)) * evaluations
        # Rows of the whole table that the records' listeners are shown.
        narrow_rows = 0 if table is None else _touched(table, used, exact=True)
        count = sum(p.numel() for p in trained)
        moments = 2 * gradients
        optimizer = _adamw_seconds(trained) * steps
        everything = sum(_bytes(p) for p in whole)
    copy_of_best = 0 if dev is None or directory is not None else weights
    kept = {
        "interpreter, libraries, texts": base,
        "weights": weights + still,
        "whole word embeddings, rows in use": narrow_rows,
        "copy of the best weights": copy_of_best,
    }
    training = {
        **kept,
        "gradients": gradients,
        "optimiser's moments": moments,
        "activations and workspace": activations,
    }
    evaluation = {**kept, "optimiser's moments": moments, "activations and workspace": eval_peak}
    stages = {"training": training, "evaluation": evaluation}
    if table is not None and directory is None:
        stages["end"] = {**kept, "whole word embeddings, rows in use": _bytes(table)}
    peak_at = max(stages, key=lambda name: sum(stages[name].values()))
    seconds = {
        "forward and backward": float(_seconds(timed, tokens).sum()),
        "optimiser": optimizer,
    }
    if dev is not None:
        seconds["evaluation"] = answering
    if directory is not None:
        seconds["writing of checkpoints, at most"] = (
            everything * evaluations * _write_seconds(directory)
        )
    return FinetunePlan(
        {name: int(size) for name, size in stages[peak_at].items() if size},
        peak_at,
        seconds,
        steps,
        int(tokens.sum()),
        int(tokens.max()),
        count,
        sum(p.numel() for p in whole),
        evaluations,
    )


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _used_rows(every: Sequence[Sequence[Sequence[int]]]) -> np.ndarray[Any, Any]:
    parts = [np.asarray(s, dtype=np.int64) for sequences in every for s in sequences]
    return np.unique(np.concatenate(parts))


def _touched(table: torch.Tensor, rows: np.ndarray[Any, Any], *, exact: bool = False) -> int:
    """Bytes of a table's pages that come into memory with these rows.

    Reading a mapped file brings in the 64 KiB around a page (fault_around_bytes of Linux); writing
    takes the pages alone.
    """
    row = _bytes(table) // max(1, table.shape[0])
    page = 4096 if exact else 65536
    first, last = rows * row // page, (rows * row + row - 1) // page
    pages = np.unique(np.concatenate([np.minimum(first + n, last) for n in range(row // page + 2)]))
    return min(_bytes(table), len(pages) * page)


def _time_of_step(
    model: PreTrainedModel, task: Task, data: Features, part: Sequence[int], bf16: bool
) -> float:
    taken = []
    for _ in range(_TIMES):
        started = time.perf_counter()
        batch = packed(
            data.sequences,
            data.rows(part),
            pad_token_id=int(model.config.pad_token_id),
            device=model.device,
        )
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            loss = task.loss(model, batch, [data.targets[example] for example in part])
        loss.backward()
        taken.append(time.perf_counter() - started)
    return min(taken)


def _evaluation(
    model: PreTrainedModel,
    data: Features,
    tokens: np.ndarray[Any, Any],
    parts: Sequence[Sequence[int]],
    largest: int,
) -> tuple[float, int]:
    """Seconds a token of a forward pass, and what one of twice the largest batch takes."""
    twice = [*parts[largest], *parts[largest]]
    model.eval()
    before = resident_memory()
    with torch.no_grad(), peak_memory() as peak:
        started = time.perf_counter()
        model(
            packed=packed(
                data.sequences,
                data.rows(twice),
                pad_token_id=int(model.config.pad_token_id),
                device=model.device,
            )
        )
        taken = time.perf_counter() - started
    return taken / (2 * int(tokens[largest])), max(0, peak.bytes - before)


def _seconds(timed: Sequence[tuple[int, float]], tokens: np.ndarray[Any, Any]) -> Any:
    """Seconds of each batch, straight lines between what was measured."""
    points = sorted(timed)
    return np.interp(tokens, [count for count, _ in points], [taken for _, taken in points])


def _adamw_seconds(trained: Sequence[torch.nn.Parameter]) -> float:
    """Seconds of one step over all that is trained, from one over a tensor of moderate size."""
    if not trained:
        return 0.0
    like = trained[0]
    weight = torch.nn.Parameter(torch.zeros(_MEASURED_ELEMENTS, dtype=like.dtype))
    optimizer = torch.optim.AdamW([weight], fused=like.dtype in (torch.float32, torch.float64))
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    started = time.perf_counter()
    torch.nn.utils.clip_grad_norm_([weight], 1.0)
    optimizer.step()
    taken = time.perf_counter() - started
    return taken / _MEASURED_ELEMENTS * sum(p.numel() for p in trained)


def _write_seconds(directory: Path) -> float:
    """Seconds a byte to the disk of a folder that may not be there yet."""
    there = next(path for path in (directory, *directory.resolve().parents) if path.is_dir())
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            started = time.perf_counter()
            file.write(bytes(_WRITTEN_BYTES))
            file.flush()
            os.fsync(file.fileno())
            return (time.perf_counter() - started) / _WRITTEN_BYTES
    except OSError:
        return 0.0


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    if seconds < 5400:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"
