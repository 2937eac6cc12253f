"""A run that has ended, found again: what `finetune` gives where it is to go on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_model

from xlmr_ext.json_files import read_json
from xlmr_ext.saving import LOG_NAME
from xlmr_ext.training.identity import Identity, ResumeError
from xlmr_ext.training.records import EpochRecord, FinetuneResult

if TYPE_CHECKING:
    from xlmr_ext.pretrained import PreTrainedModel
    from xlmr_ext.tasks.base import Features, Task

_WEIGHTS = "model.safetensors"


def finished_run(
    directory: Path,
    identity: Identity,
    model: PreTrainedModel,
    task: Task,
    dev: Features | None,
    *,
    batch_size: int,
) -> FinetuneResult | None:
    """The result of a run whose log says that it ended, with the model given its weights.

    None where there is no such log: the run has not ended, or never begun.

    Raises:
        ResumeError: it was another run, or its weights are not there.
    """
    log = ended_log(directory, identity, model)
    if log is None:
        return None
    end = log["end"]
    return FinetuneResult(
        history=[EpochRecord.from_row(row) for row in log["history"]],
        losses=log["losses"],
        best_epoch=log["epoch"],
        best_step=log["step"],
        steps=len(log["losses"]),
        seconds=end["seconds"],
        at_chance=end["at_chance"],
        labels=task.labels,
        output_dir=directory,
        task=task.name,
        scores=None if dev is None else task.evaluate(model, dev, batch_size=2 * batch_size),
        stopped_early=end["stopped_early"],
        resumed_at=len(log["losses"]),
    )


def ended_log(directory: Path, identity: Identity, model: PreTrainedModel) -> dict[str, Any] | None:
    """The log of the run in a directory, where it has ended; the model then has its weights.

    Raises:
        ResumeError: it was another run, or its weights are not there.
    """
    path = directory / LOG_NAME
    if not path.is_file():
        return None
    log: dict[str, Any] = read_json(path, dict, what="a training log")
    end = log.get("end")
    if not isinstance(end, dict):
        return None
    identity.check(end["run"], f"the run in {directory}")
    weights = directory / _WEIGHTS
    if not weights.is_file():
        raise ResumeError(
            f"the run in {directory} has ended, and its weights, {_WEIGHTS}, are not there"
        )
    load_model(model, str(weights))
    return log
