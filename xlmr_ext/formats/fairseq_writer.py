"""Writes XLM-R checkpoints that fairseq loads; :mod:`xlmr_ext.formats.fairseq` reads them."""

from __future__ import annotations

import argparse
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from xlmr_ext.files import replace_files
from xlmr_ext.formats.dictionary import PAD, dictionary_text
from xlmr_ext.formats.fairseq import (
    ACTIVATIONS,
    DICTIONARY_NAME,
    LAYER,
    LM_BIAS,
    LM_HEAD,
    LM_MATRIX,
    MODEL_NAME,
    NORM,
    NORM_EPS,
    PIECES_NAME,
    POSITIONS,
    TYPES,
    WORDS,
    listed,
)
from xlmr_ext.tokenizer.pieces import Pieces

__all__ = ["DEFAULT_HEAD", "write_fairseq"]

DEFAULT_HEAD = "sentence_classification_head"  # fairseq's own


def write_fairseq(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    folder: str | Path,
    *,
    pieces: Path,
    names: Literal["new", "old"] = "new",
    head: str = DEFAULT_HEAD,
) -> list[str]:
    """Writes ``model.pt``, ``dict.txt`` and ``sentencepiece.bpe.model``, all or none of them.

    fairseq's ``XLMRModel.from_pretrained(folder)`` loads them.

    Args:
        config: the content of a ``config.json`` (``model.config.to_dict()``).
        tensors: by Hugging Face's names (``model.state_dict()``): an encoder, with or without
            ``roberta.`` in front, and the head of sequence classification or of the masked
            language model.
        folder: made where absent.
        pieces: the sentencepiece model of the tokenizer, in XLM-R's layout.
        names: those of release 0.12, or the old ones, which all releases read.
        head: the classification head's name.

    Returns:
        What was left out or differs, a sentence each.

    Raises:
        OSError: writing failed.
        ValueError: fairseq's XLM-R cannot compute what this model does.
    """
    if names not in ("new", "old"):
        raise ValueError(f"names must be 'new' or 'old', got {names!r}")
    if not head or "." in head:
        raise ValueError(f"head must be a name without dots, got {head!r}")
    notes: list[str] = []
    tokens = Pieces(pieces).names()
    entries = {
        f"roberta.{name}" if name.startswith(("embeddings.", "encoder.", "pooler.")) else name: (
            tensor.detach().cpu()
        )
        for name, tensor in tensors.items()
    }
    settings = _fairseq_settings(config, notes)
    state = _fairseq_entries(entries, settings, len(tokens), names, head, notes)
    checkpoint = {
        "args": argparse.Namespace(**settings),
        "model": state,
        # What fairseq's loader looks up in every checkpoint.
        "optimizer_history": [
            {
                "criterion_name": "MaskedLmLoss",
                "optimizer_name": "FairseqAdam",
                "lr_scheduler_state": {},
                "num_updates": 0,
            }
        ],
        "extra_state": {"train_iterator": {"epoch": 1, "iterations_in_epoch": 0}},
        "last_optimizer_state": None,
    }
    dictionary = dictionary_text(tokens).encode()
    model_of_pieces = pieces.read_bytes()
    writers: dict[str, Callable[[Path], object]] = {
        MODEL_NAME: lambda path: _save(checkpoint, path),
        DICTIONARY_NAME: lambda path: path.write_bytes(dictionary),
        PIECES_NAME: lambda path: path.write_bytes(model_of_pieces),
    }
    replace_files(folder, writers)
    return notes


def _save(checkpoint: Mapping[str, Any], path: Path) -> None:
    with path.open("wb") as file:
        torch.save(checkpoint, file)


def _fairseq_settings(config: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """fairseq's settings of a configuration."""
    for name, needed in (
        ("model_type", "xlm-roberta"),
        ("pad_token_id", PAD),
        ("position_embedding_type", "absolute"),
    ):
        if config.get(name, needed) != needed:
            raise ValueError(f"{name} is {config[name]!r}; fairseq's XLM-R has {needed!r}")
    activations = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    activations["gelu_pytorch_tanh"] = activations["gelu_new"]
    activation = activations.get(config["hidden_act"])
    if activation is None:
        raise ValueError(f"hidden_act is {config['hidden_act']!r}, which fairseq does not have")
    if config["layer_norm_eps"] != NORM_EPS:
        notes.append(
            f"layer_norm_eps is {config['layer_norm_eps']}, fairseq always adds {NORM_EPS}: "
            "results differ slightly"
        )
    positions = config["max_position_embeddings"] - PAD - 1
    dropout, head_dropout = config["hidden_dropout_prob"], config.get("classifier_dropout")
    shape = (config["num_hidden_layers"], config["hidden_size"])
    return {
        "arch": {(12, 768): "roberta_base", (24, 1024): "roberta_large"}.get(shape, "roberta"),
        "task": "multilingual_masked_lm",
        "criterion": "masked_lm",
        "seed": 1,
        "sample_break_mode": "complete",
        "tokens_per_sample": positions,
        "max_positions": positions,
        "encoder_layers": shape[0],
        "encoder_embed_dim": shape[1],
        "encoder_ffn_embed_dim": config["intermediate_size"],
        "encoder_attention_heads": config["num_attention_heads"],
        "activation_fn": activation,
        "pooler_activation_fn": "tanh",
        "dropout": dropout,
        "attention_dropout": config["attention_probs_dropout_prob"],
        "activation_dropout": 0.0,
        "pooler_dropout": dropout if head_dropout is None else head_dropout,
        "encoder_learned_pos": True,
        "encoder_normalize_before": False,
        "no_scale_embedding": True,
    }


def _fairseq_entries(
    entries: dict[str, Tensor],
    settings: Mapping[str, Any],
    words: int,
    names: str,
    head: str,
    notes: list[str],
) -> OrderedDict[str, Tensor]:
    """fairseq's entries; takes what it uses out of ``entries`` and notes the rest."""
    prefix, norm = (
        ("encoder", "layernorm_embedding") if names == "new" else ("decoder", "emb_layer_norm")
    )
    encoder = f"{prefix}.sentence_encoder"
    state: OrderedDict[str, Tensor] = OrderedDict()

    def move(new: str, old: str) -> None:
        if old not in entries:
            raise ValueError(f"the model has no {old}")
        state[new] = _compact(entries.pop(old))

    rows = entries.get(WORDS)
    if rows is None or rows.shape[0] < words:
        raise ValueError(
            f"the tokenizer has {words} tokens and the model "
            f"{'no' if rows is None else rows.shape[0]} word embeddings"
        )
    if rows.shape[0] > words:
        notes.append(f"left out: {rows.shape[0] - words} word rows beyond the tokenizer's <mask>")
    for name in (WORDS, LM_BIAS):
        if name in entries:
            entries[name] = entries[name][:words]
    _fold_types(entries, notes)
    move(f"{encoder}.embed_tokens.weight", WORDS)
    move(f"{encoder}.embed_positions.weight", POSITIONS)
    for layer in range(settings["encoder_layers"]):
        for new, old in LAYER.items():
            for kind in ("weight", "bias"):
                name = f"roberta.encoder.layer.{layer}.{old}.{kind}"
                move(f"{encoder}.layers.{layer}.{new}.{kind}", name)
    for kind in ("weight", "bias"):
        move(f"{encoder}.{norm}.{kind}", f"{NORM}.{kind}")

    matrix = state[f"{encoder}.embed_tokens.weight"]
    state[f"{prefix}.{LM_MATRIX}"] = matrix
    if LM_BIAS not in entries:
        # fairseq's model has this head whether it is used or not, and refuses a file without.
        hidden = settings["encoder_embed_dim"]
        entries[LM_BIAS] = matrix.new_zeros(words)
        entries["lm_head.dense.weight"] = matrix.new_zeros(hidden, hidden)
        entries["lm_head.layer_norm.weight"] = matrix.new_ones(hidden)
        for name in LM_HEAD:
            entries[f"{name}.bias"] = matrix.new_zeros(hidden)
        notes.append(
            "the model has no head of a masked language model, which fairseq demands: the one in "
            f"{MODEL_NAME} is untrained and finds every word equally likely"
        )
    move(f"{prefix}.{LM_BIAS}", LM_BIAS)
    for name in LM_HEAD:
        for kind in ("weight", "bias"):
            move(f"{prefix}.{name}.{kind}", f"{name}.{kind}")
    if "classifier.dense.weight" in entries:
        for name in ("dense.weight", "dense.bias", "out_proj.weight", "out_proj.bias"):
            move(f"classification_heads.{head}.{name}", f"classifier.{name}")
    for name in ("lm_head.decoder.weight", "lm_head.decoder.bias"):
        entries.pop(name, None)  # the word embeddings and lm_head.bias once more
    if entries:
        notes.append(f"left out, as fairseq has no place for them: {listed(sorted(entries))}")
    return state


def _fold_types(entries: dict[str, Tensor], notes: list[str]) -> None:
    """Adds token type 0, which every token has and fairseq does not know, to the positions."""
    types = entries.pop(TYPES, None)
    positions = entries.get(POSITIONS)
    if types is None or positions is None:
        return
    if bool(types[0].any()):
        folded = positions.clone()
        folded[PAD + 1 :] += types[0]
        entries[POSITIONS] = folded
        notes.append("the row of token type 0 is added to the positions, as fairseq has no types")
    if types.shape[0] > 1:
        notes.append(f"left out: {types.shape[0] - 1} further token types")


def _compact(tensor: Tensor) -> Tensor:
    """The tensor without the rest of its storage, which ``torch.save`` would write as well."""
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor.contiguous() if whole else tensor.clone(memory_format=torch.contiguous_format)
