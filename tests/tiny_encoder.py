"""A tiny encoder for tests of sentence vectors, and what its vectors must be."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from xlmr_vocabulary import write_tiny_vocabulary

from xlmr_ext import XLMRobertaConfig, XLMRobertaModel, XLMRobertaTokenizer

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "",
    "Wir haben gestern in der Stadt ein neues Buch gekauft, und noch eins, und noch eins.",
    "今天天气很好",
    "Le petit chat noir dort sous la table " * 3,
    "a",
]


def write_tiny_encoder(folder: Path) -> Path:
    """An encoder of 2 layers and 48 positions with its tokenizer."""
    tokenizer = XLMRobertaTokenizer(write_tiny_vocabulary(folder))
    config = XLMRobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=30,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=37,
        max_position_embeddings=50,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    XLMRobertaModel(config, add_pooling_layer=False).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def hidden_states(folder: Path, texts: list[str], limit: int = 48) -> list[Tensor]:
    """transformers' hidden states of each text's tokens, float64, each text alone."""
    transformers = pytest.importorskip("transformers")
    model = transformers.XLMRobertaModel.from_pretrained(folder, add_pooling_layer=False)
    model = model.double().eval()
    tokenizer = XLMRobertaTokenizer.from_pretrained(folder)
    states = []
    for text in texts:
        ids = tokenizer(text, truncation=True, max_length=limit, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            states.append(model(ids).last_hidden_state[0])
    return states


def formula(rows: Tensor, mode: str) -> Tensor:
    """One vector of a text's states [n, hidden], by sentence-transformers' definition."""
    count = len(rows)
    weights = torch.arange(1, count + 1, dtype=rows.dtype)
    return {
        "cls": rows[0],
        "max": rows.amax(0),
        "mean": rows.sum(0) / count,
        "mean_sqrt_len_tokens": rows.sum(0) / math.sqrt(count),
        "weightedmean": (rows * weights[:, None]).sum(0) / weights.sum(),
        "lasttoken": rows[-1],
    }[mode]
