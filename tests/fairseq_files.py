"""Small checkpoints of fairseq, made with torch alone, and what fairseq computes from them.

The forward pass follows fairseq's modules (TransformerSentenceEncoder, MultiheadAttention,
RobertaLMHead, RobertaClassificationHead), by fairseq's names and in plain torch.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from torch import Tensor
from torch.nn import functional as F
from xlmr_vocabulary import write_tiny_vocabulary

HIDDEN, HEADS, FFN, LAYERS, POSITIONS = 24, 3, 40, 2, 22
PAD, UNK = 1, 3

SETTINGS: dict[str, Any] = {
    "arch": "roberta_base",
    "task": "multilingual_masked_lm",
    "encoder_layers": LAYERS,
    "encoder_embed_dim": HIDDEN,
    "encoder_ffn_embed_dim": FFN,
    "encoder_attention_heads": HEADS,
    "activation_fn": "gelu",
    "pooler_activation_fn": "tanh",
    "dropout": 0.1,
    "attention_dropout": 0.2,
    "pooler_dropout": 0.3,
    "max_positions": POSITIONS - PAD - 1,
    "seed": 1,
    "lr": [1e-4],
}


def pieces_of(path: Path) -> list[str]:
    """Pieces of a sentencepiece model without its first three, the special ones."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    return [model.id_to_piece(index) for index in range(3, len(model))]


def random_state(
    words: int,
    *,
    old: bool = False,
    fused: bool = False,
    heads: Mapping[str, int] | None = None,
    lm_head: bool = True,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """Entries of a model, random everywhere, so that no mix-up stays hidden."""
    generator = torch.Generator().manual_seed(7)

    def values(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * 0.3).to(dtype)

    top = "decoder" if old else "encoder"
    at = f"{top}.sentence_encoder"
    state = {
        f"{at}.embed_tokens.weight": values(words, HIDDEN),
        f"{at}.embed_positions.weight": values(POSITIONS, HIDDEN),
    }
    for kind in ("weight", "bias"):
        norm = "emb_layer_norm" if old else "layernorm_embedding"
        state[f"{at}.{norm}.{kind}"] = values(HIDDEN)
    for layer in range(LAYERS):
        name = f"{at}.layers.{layer}"
        if fused:
            state[f"{name}.self_attn.in_proj_weight"] = values(3 * HIDDEN, HIDDEN)
            state[f"{name}.self_attn.in_proj_bias"] = values(3 * HIDDEN)
        for part in ("out",) if fused else ("q", "k", "v", "out"):
            state[f"{name}.self_attn.{part}_proj.weight"] = values(HIDDEN, HIDDEN)
            state[f"{name}.self_attn.{part}_proj.bias"] = values(HIDDEN)
        for part, rows, columns in (("fc1", FFN, HIDDEN), ("fc2", HIDDEN, FFN)):
            state[f"{name}.{part}.weight"] = values(rows, columns)
            state[f"{name}.{part}.bias"] = values(rows)
        for part in ("self_attn_layer_norm", "final_layer_norm"):
            state[f"{name}.{part}.weight"] = values(HIDDEN)
            state[f"{name}.{part}.bias"] = values(HIDDEN)
    if lm_head:
        state[f"{top}.lm_head.weight"] = state[f"{at}.embed_tokens.weight"]
        state[f"{top}.lm_head.bias"] = values(words)
        state[f"{top}.lm_head.dense.weight"] = values(HIDDEN, HIDDEN)
        state[f"{top}.lm_head.dense.bias"] = values(HIDDEN)
        state[f"{top}.lm_head.layer_norm.weight"] = values(HIDDEN)
        state[f"{top}.lm_head.layer_norm.bias"] = values(HIDDEN)
    for head, labels in (heads or {}).items():
        name = f"classification_heads.{head}"
        state[f"{name}.dense.weight"] = values(HIDDEN, HIDDEN)
        state[f"{name}.dense.bias"] = values(HIDDEN)
        state[f"{name}.out_proj.weight"] = values(labels, HIDDEN)
        state[f"{name}.out_proj.bias"] = values(labels)
    return state


def write_folder(
    folder: Path,
    *,
    shuffled: bool = False,
    settings: Mapping[str, Any] | None = None,
    as_cfg: bool = False,
    legacy: bool = False,
    vocabulary: bool = True,
    **state: Any,
) -> dict[str, Tensor]:
    """Writes model.pt, dict.txt and sentencepiece.bpe.model; returns the model's entries.

    shuffled: the words of dict.txt are in another order than the sentencepiece model's.
    as_cfg: the settings are where releases from 1.0 on have them.
    legacy: as torch before 1.6 wrote files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pieces = pieces_of(write_tiny_vocabulary(folder))
    if shuffled:
        random.Random(3).shuffle(pieces)
    (folder / "dict.txt").write_text("".join(f"{piece} 100\n" for piece in pieces))
    entries = random_state(len(pieces) + 5, **state)
    args = argparse.Namespace(**{**SETTINGS, **(settings or {})})
    checkpoint: dict[str, Any] = {
        "args": None if as_cfg else args,
        "model": entries,
        "optimizer_history": [
            {"optimizer_name": "FairseqAdam", "lr_scheduler_state": {}, "num_updates": 5}
        ],
        "extra_state": {"epoch": 3},
        "last_optimizer_state": {"state": {0: {"exp_avg": torch.zeros(3)}}},
    }
    if as_cfg:
        checkpoint["cfg"] = {"common": {"seed": 1}, "model": vars(args)}
    torch.save(checkpoint, folder / "model.pt", _use_new_zipfile_serialization=not legacy)
    if not vocabulary:
        (folder / "sentencepiece.bpe.model").unlink()
    return entries


def batch(words: int) -> Tensor:
    """Ids [3, S] padded on the right; one row uses every position."""
    ids = torch.randint(4, words, (3, POSITIONS - 2))
    ids[1, 5:] = 1
    ids[2, 1:] = 1
    return ids


def encode(folder: Path, text: str) -> list[int]:
    """A text's ids as fairseq's hub interface makes them: pieces, then the dictionary."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "sentencepiece.bpe.model"))
    ids = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
    for line in (folder / "dict.txt").read_text().splitlines():
        ids[line.rsplit(" ", 1)[0]] = len(ids)
    return [0, *(ids.get(piece, UNK) for piece in model.encode(text, out_type=str)), 2]


def forward(state: Mapping[str, Tensor], ids: Tensor, activation: str = "gelu") -> Tensor:
    """Hidden states [B, S, hidden] of ids [B, S] padded on the right."""
    entries = {
        name.replace("decoder.", "encoder.").replace("emb_layer_norm", "layernorm_embedding"): value
        for name, value in state.items()
    }

    def get(name: str) -> Tensor:
        return entries[f"encoder.sentence_encoder.{name}"]

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (x.shape[-1],), get(f"{name}.weight"), get(f"{name}.bias"), 1e-5)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ get(f"{name}.weight").T + get(f"{name}.bias")

    batch, length = ids.shape
    real = ids != PAD
    positions = torch.cumsum(real, 1) * real + PAD
    x = get("embed_tokens.weight")[ids] + get("embed_positions.weight")[positions]
    x = norm(x, "layernorm_embedding") * real[..., None]
    layer = 0
    while f"encoder.sentence_encoder.layers.{layer}.fc1.weight" in entries:
        at = f"layers.{layer}"
        if f"encoder.sentence_encoder.{at}.self_attn.in_proj_weight" in entries:
            fused = x @ get(f"{at}.self_attn.in_proj_weight").T + get(
                f"{at}.self_attn.in_proj_bias"
            )
            q, k, v = fused.split(HIDDEN, -1)
        else:
            q, k, v = (linear(x, f"{at}.self_attn.{part}_proj") for part in "qkv")
        q, k, v = (
            part.view(batch, length, HEADS, HIDDEN // HEADS).transpose(1, 2) for part in (q, k, v)
        )
        scores = q @ k.transpose(2, 3) / math.sqrt(HIDDEN // HEADS)
        weights = scores.masked_fill(~real[:, None, None, :], -math.inf).softmax(-1)
        mixed = (weights @ v).transpose(1, 2).reshape(batch, length, HIDDEN)
        x = norm(x + linear(mixed, f"{at}.self_attn.out_proj"), f"{at}.self_attn_layer_norm")
        inner = linear(x, f"{at}.fc1")
        if activation == "gelu":
            inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
        else:  # gelu_accurate
            cubic = inner + 0.044715 * inner**3
            inner = 0.5 * inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * cubic))
        x = norm(x + linear(inner, f"{at}.fc2"), f"{at}.final_layer_norm")
        layer += 1
    return x


def head_logits(state: Mapping[str, Tensor], hidden: Tensor, head: str) -> Tensor:
    """[B, labels] of a classification head."""
    part = {
        name.removeprefix(f"classification_heads.{head}."): value for name, value in state.items()
    }
    dense = torch.tanh(hidden[:, 0] @ part["dense.weight"].T + part["dense.bias"])
    return dense @ part["out_proj.weight"].T + part["out_proj.bias"]


def lm_logits(state: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
    """[B, S, words] of the masked language model."""
    part = {name.split("lm_head.")[1]: value for name, value in state.items() if "lm_head" in name}
    x = hidden @ part["dense.weight"].T + part["dense.bias"]
    x = x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    x = F.layer_norm(x, (HIDDEN,), part["layer_norm.weight"], part["layer_norm.bias"], 1e-5)
    return x @ part["weight"].T + part["bias"]
