"""Tiny models with heads whose answers differ from text to text, and their folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pairs import make_config, randomize
from xlmr_vocabulary import write_tiny_vocabulary

import xlmr_ext
from xlmr_ext import XLMRobertaTokenizer

TAGS = ["B-LOC", "B-PER", "I-LOC", "I-PER", "O"]
POSITIONS = 90


def make_head(tokenizer: XLMRobertaTokenizer, kind: str, labels: list[str], **more: Any) -> Any:
    """``xlmr_ext.<kind>`` with random weights, in eval mode; it takes 88 tokens."""
    config = make_config(
        vocab_size=len(tokenizer),
        max_position_embeddings=POSITIONS,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
        **more,
    )
    torch.manual_seed(1)
    model = randomize(getattr(xlmr_ext, kind)(config), 0.1).eval()
    with torch.no_grad():
        getattr(model, "roberta", model).embeddings.word_embeddings.weight.normal_()
        if hasattr(model, "classifier"):
            last = getattr(model.classifier, "out_proj", model.classifier)
            last.weight.normal_()
            last.bias.zero_()
        if hasattr(model, "qa_outputs"):
            model.qa_outputs.weight.normal_()
    return model


def write_head(folder: Path, kind: str, labels: list[str], **more: Any) -> Path:
    """The same with its tokenizer, as a checkpoint."""
    folder.mkdir(exist_ok=True)
    tokenizer = XLMRobertaTokenizer(write_tiny_vocabulary(folder))
    make_head(tokenizer, kind, labels, **more).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
