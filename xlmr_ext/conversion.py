"""Checkpoints from one layout into another: Hugging Face's, BERT's, fairseq's."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from xlmr_ext.checkpoint import load_model, open_checkpoint, parse_dtype
from xlmr_ext.configuration import CONFIG_NAME, XLMRobertaConfig, read_config
from xlmr_ext.files import pinned
from xlmr_ext.formats.bert import WORDS, is_bert_layout
from xlmr_ext.formats.fairseq import MODEL_NAME, PIECES_NAME, listed, read_fairseq
from xlmr_ext.formats.fairseq_writer import DEFAULT_HEAD, write_fairseq
from xlmr_ext.formats.frozen_file import FrozenFile
from xlmr_ext.formats.weights_file import TensorDict, WeightsFile
from xlmr_ext.heads import (
    XLMRobertaForMultipleChoice,
    XLMRobertaForQuestionAnswering,
    XLMRobertaForSequenceClassification,
    XLMRobertaForTokenClassification,
)
from xlmr_ext.hub import OutOfReachError
from xlmr_ext.masked_lm import XLMRobertaForMaskedLM
from xlmr_ext.modeling import XLMRobertaModel
from xlmr_ext.pretrained import PreTrainedModel
from xlmr_ext.saving import prepare_folder, replace_checkpoint
from xlmr_ext.tokenization import XLMRobertaTokenizer
from xlmr_ext.weights import Plan

__all__ = ["convert_checkpoint"]

# Buffers, and the word embeddings once more: what files hold beside the model.
_WITHOUT_MEANING = re.compile(r"(^|\.)embeddings\.(position|token_type)_ids$|^lm_head\.decoder\.")


_CLASSES: dict[str, type[PreTrainedModel]] = {
    kind.__name__: kind
    for kind in (
        XLMRobertaModel,
        XLMRobertaForMaskedLM,
        XLMRobertaForMultipleChoice,
        XLMRobertaForQuestionAnswering,
        XLMRobertaForSequenceClassification,
        XLMRobertaForTokenClassification,
    )
}


def convert_checkpoint(
    source: str | Path,
    output: str | Path,
    *,
    to: Literal["hf", "fairseq"] = "hf",
    names: Literal["new", "old"] = "new",
    head: str | None = None,
    dtype: torch.dtype | str | None = None,
    max_shard_size: int | str = "5GB",
    hub: Mapping[str, Any] | None = None,
) -> list[str]:
    """Reads a checkpoint of any known layout, tokenizer included, and writes it in another.

    Args:
        source: a directory or hub name with a ``config.json`` (XLM-R's, or BERT's with XLM-R's
            vocabulary), or a directory of fairseq's (``model.pt``, ``dict.txt``), or a checkpoint
            file of fairseq's in one.
        output: a directory, new or empty; all files appear there at the end.
        to: ``"hf"`` (``config.json``, ``model.safetensors``) or ``"fairseq"``.
        names: of fairseq's entries: release 0.12's, or the old ones, which all releases read.
        head: the name of fairseq's classification head: the one to keep where several are, the
            one to write.
        dtype: type of the weights; None: as they are.
        max_shard_size: of one file of weights, in Hugging Face's layout.
        hub: ``revision``, ``cache_dir``, ``local_files_only``, ``token`` for a hub name.

    Returns:
        What was left out or differs, a sentence each.

    Raises:
        OSError: a file is not there, cannot be read or written, or ``output`` is not empty.
        TypeError, ValueError: the checkpoint is not usable, or cannot be expressed in the layout.
    """
    if to not in ("hf", "fairseq"):
        raise ValueError(f"to must be 'hf' or 'fairseq', got {to!r}")
    wanted = "auto" if dtype is None else parse_dtype(dtype)
    target = Path(output)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists and is not an empty directory")
    path = Path(source).expanduser()
    if path.is_file() or ((path / MODEL_NAME).is_file() and not (path / CONFIG_NAME).exists()):
        model, tokenizer, notes = _read_fairseq(path, head, wanted)
    else:
        if head is not None and to == "hf":
            raise ValueError(
                f"head is {head!r}; it names a head of a fairseq checkpoint, and neither the "
                "source nor the output is one"
            )
        model, tokenizer, notes = _read_hugging_face(str(source), wanted, dict(hub or {}))

    def write_hf(folder: Path) -> None:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)

    def write_fs(folder: Path) -> None:
        assert tokenizer is not None
        with tempfile.TemporaryDirectory() as scratch:
            tokenizer.save_pretrained(scratch)
            notes.extend(
                write_fairseq(
                    model.config.to_dict(),
                    model.state_dict(),
                    folder,
                    pieces=Path(scratch) / PIECES_NAME,
                    names=names,
                    head=head or DEFAULT_HEAD,
                )
            )

    if tokenizer is None:
        if to == "fairseq":
            raise FileNotFoundError(
                f"{source} has no tokenizer, without which no dict.txt can be written"
            )
        notes.append("no tokenizer was there to be copied")
    replace_checkpoint(prepare_folder(target), write_hf if to == "hf" else write_fs)
    return notes


def _read_fairseq(
    path: Path, head: str | None, dtype: torch.dtype | Literal["auto"]
) -> tuple[PreTrainedModel, XLMRobertaTokenizer | None, list[str]]:
    values, tensors, notes = read_fairseq(path, head=head)
    try:
        config = XLMRobertaConfig.from_dict(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    weights = TensorDict(tensors, path)
    model, _ = _load(_CLASSES[values["architectures"][0]], config, weights, dtype)
    pieces = (path if path.is_dir() else path.parent) / PIECES_NAME
    if not pieces.is_file():
        return model, None, notes
    return model, XLMRobertaTokenizer(pieces, model_max_length=config.longest_input), notes


def _read_hugging_face(
    source: str, dtype: torch.dtype | Literal["auto"], hub: Mapping[str, Any]
) -> tuple[PreTrainedModel, XLMRobertaTokenizer | None, list[str]]:
    notes: list[str] = []
    path, values = read_config(source, **hub)
    config = XLMRobertaConfig.from_file(path, values)
    if is_bert_layout(values):
        notes.append(
            f"BERT's layout: word rows beyond {WORDS} and token type 1 are left out, which XLM-R's "
            "tokenizer never gives"
        )
    hub = pinned(hub, path)
    weights = open_checkpoint(source, hub, values)
    if isinstance(weights, FrozenFile):
        raise ValueError(
            f"{weights.path}: of a frozen model, whose weights are packed: convert the checkpoint "
            "that it was made from"
        )
    architecture = (config.architectures or ["none"])[0]
    kind = _CLASSES.get(architecture, XLMRobertaModel)
    if kind.__name__ != architecture:
        notes.append(f"the class in {path.name} is {architecture}: the encoder alone is kept")
    elif kind is XLMRobertaForMaskedLM and not getattr(config, "tie_word_embeddings", True):
        kind = XLMRobertaModel
        notes.append("the encoder alone is kept: the language model has a matrix of its own")
    model, plan = _load(kind, config, weights, dtype)
    if plan.missing:
        raise ValueError(
            f"{weights.path}: no whole {kind.__name__}: it lacks {listed(plan.missing)}"
        )
    left = sorted(set(weights.shapes) - set(plan.source.values()))
    left = [name for name in left if not _WITHOUT_MEANING.search(name)]
    if left:
        notes.append(f"left out: {listed(left)}")
    try:
        tokenizer = XLMRobertaTokenizer.from_pretrained(source, **hub)
    except OutOfReachError:  # there may be one
        raise
    except FileNotFoundError:
        return model, None, notes
    return model, tokenizer, notes


def _load(
    kind: type[PreTrainedModel],
    config: XLMRobertaConfig,
    weights: WeightsFile,
    dtype: torch.dtype | Literal["auto"],
) -> tuple[PreTrainedModel, Plan]:
    def build() -> PreTrainedModel:
        if kind is XLMRobertaModel:
            has_pooler = any(name.endswith("pooler.dense.weight") for name in weights.shapes)
            return XLMRobertaModel(config, add_pooling_layer=has_pooler)
        return kind(config)

    return load_model(build, weights, dtype=dtype, ignore_mismatched_sizes=False)
