"""A classifier without kernels: what fine-tuning and prediction ask of a model, and no more."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from xlmr_ext.weights import tensors_to_save, write_weights

VOCABULARY = 300


class StubClassifier(torch.nn.Module):
    """Logits are a linear map of the mean word embedding."""

    def __init__(self, num_labels: int = 2, hidden: int = 8) -> None:
        super().__init__()
        self.config = SimpleNamespace(
            vocab_size=VOCABULARY,
            pad_token_id=1,
            max_position_embeddings=34,
            longest_input=32,
            num_labels=num_labels,
            problem_type=None,
            id2label={index: f"LABEL_{index}" for index in range(num_labels)},
            label2id={f"LABEL_{index}": index for index in range(num_labels)},
        )
        self.roberta = torch.nn.Module()
        self.roberta.embeddings = torch.nn.Module()
        self.roberta.embeddings.word_embeddings = torch.nn.Embedding(
            VOCABULARY, hidden, padding_idx=1
        )
        self.norm = torch.nn.LayerNorm(hidden)
        self.classifier = torch.nn.Linear(hidden, num_labels)
        self.batches: list[list[int]] = []
        self.interrupt_at: int | None = None

    @property
    def device(self) -> torch.device:
        return self.classifier.weight.device

    def forward(self, packed: Any, labels: torch.Tensor | None = None) -> SimpleNamespace:
        self.batches.append(packed.cu_seqlens.diff().tolist())
        if len(self.batches) == self.interrupt_at:
            raise KeyboardInterrupt
        words = self.roberta.embeddings.word_embeddings(packed.input_ids)
        starts = packed.cu_seqlens.tolist()
        means = [words[a:b].mean(dim=0) for a, b in itertools.pairwise(starts)]
        logits = self.classifier(self.norm(torch.stack(means)))
        loss = None if labels is None else torch.nn.functional.cross_entropy(logits, labels)
        return SimpleNamespace(loss=loss, logits=logits)

    def save_pretrained(self, directory: Path, *, state_dict: Any = None) -> None:
        entries = self.state_dict(keep_vars=True) if state_dict is None else state_dict
        write_weights(tensors_to_save(entries), directory / "model.safetensors")
        (directory / "config.json").write_text(json.dumps({"id2label": self.config.id2label}))


class StubTokenizer:
    """The word ``w12`` is token 12; any other word is token 3."""

    def __call__(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None = None,
        *,
        truncation: bool,
        max_length: int,
    ) -> dict[str, list[list[int]]]:
        assert truncation
        rows = []
        for index, text in enumerate(texts):
            words = text.split() + ([] if pairs is None else pairs[index].split())
            ids = [int(word[1:]) if word[1:].isdigit() else 3 for word in words]
            rows.append([0, *ids[: max_length - 2], 2])
        return {"input_ids": rows}

    def save_pretrained(self, directory: Path) -> None:
        (directory / "tokenizer.txt").write_text("words are numbers")
