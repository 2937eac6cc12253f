"""Data and runs of the stub classifier, for the tests of the training loop."""

from __future__ import annotations

import random
from typing import Any

from stub_classifier import StubClassifier, StubTokenizer

from xlmr_ext import training
from xlmr_ext.data import LabelledTexts
from xlmr_ext.tasks.classification import ClassificationTask


def rows(count: int, seed: int = 0, labels: tuple[str, ...] = ("ant", "bee")) -> LabelledTexts:
    """Texts of 2 to 9 words; a label's words are its own, from ids 10 to 49."""
    source = random.Random(seed)
    pairs = []
    for index in range(count):
        label = index % len(labels)
        words = [10 + 20 * label + source.randrange(20) for _ in range(source.randint(2, 9))]
        pairs.append((" ".join(f"w{word}" for word in words), labels[label]))
    return LabelledTexts.of(pairs)


def run(
    model: StubClassifier,
    train: Any,
    *,
    tokenizer: Any = None,
    output_dir: Any = None,
    **options: Any,
) -> training.FinetuneResult:
    """`finetune` with a recipe that learns ``rows`` in three epochs."""
    tokenizer = tokenizer or StubTokenizer()
    settings = {"epochs": 3, "learning_rate": 0.1, "batch_size": 8, **options}
    task = ClassificationTask(model, tokenizer, max_length=settings.pop("max_length", 16))  # type: ignore[arg-type]
    return training.finetune(model, tokenizer, train, task=task, output_dir=output_dir, **settings)  # type: ignore[arg-type]
