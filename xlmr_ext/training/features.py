"""The data of a run, tokenized and checked against the model."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

from xlmr_ext.data import check_vocabulary

if TYPE_CHECKING:
    from xlmr_ext.pretrained import PreTrainedModel
    from xlmr_ext.tasks.base import Features, Task


def read_features(
    model: PreTrainedModel, task: Task, train: Any, dev: Any
) -> tuple[Features, Features | None]:
    """What ``finetune`` was given, as it is learnt from and evaluated on; settles the labels.

    Raises:
        ValueError: there is nothing to learn from, the task cannot use a row, or the vocabulary
            is not the model's.
    """
    train_data = task.load(train, "train")
    dev_data = None if dev is None else task.load(dev, "dev")
    task.settle(train_data)
    data = task.features(train_data, training=True)
    if not len(data):
        raise ValueError("train has no examples left to learn from")
    dev_features = None if dev_data is None else task.features(dev_data, training=False)
    every = [data] if dev_features is None else [data, dev_features]
    check_vocabulary(
        chain.from_iterable(part.sequences for part in every), int(model.config.vocab_size)
    )
    return data, dev_features
