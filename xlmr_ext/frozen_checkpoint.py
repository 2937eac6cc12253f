"""A frozen model's folder: ``config.json``, ``frozen.safetensors`` and the tokenizer's files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from xlmr_ext.checkpoint import find_weights, load_model
from xlmr_ext.configuration import CONFIG_NAME
from xlmr_ext.formats.frozen_file import FROZEN_NAME, FrozenFile, write_frozen_file
from xlmr_ext.frozen import FrozenEncoder, word_table
from xlmr_ext.layers import ACTIVATIONS
from xlmr_ext.quantization import QuantizedEmbedding
from xlmr_ext.saving import prepare_folder, replace_checkpoint
from xlmr_ext.weights import Plan

if TYPE_CHECKING:
    from xlmr_ext.pretrained import PreTrainedModel
    from xlmr_ext.tokenization import XLMRobertaTokenizer

__all__ = ["load_frozen", "refuse_other_weights", "save_frozen"]

Model = TypeVar("Model", bound="PreTrainedModel")


def load_frozen(
    build: Callable[[], Model],
    file: FrozenFile,
    *,
    dtype: torch.dtype | Literal["auto"],
    device: torch.device,
    ignore_mismatched_sizes: bool,
    verify: bool,
) -> tuple[Model, Plan]:
    """A frozen model over its mapped file; the arguments are those of ``from_pretrained``.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged, or not of this configuration; or an argument asks for what a
            frozen model is not.
    """
    if dtype not in ("auto", torch.float32):
        raise ValueError(
            f"dtype is {dtype}: {file.path} is of a frozen model, which computes in float32"
        )
    if device.type != "cpu":
        raise ValueError(
            f"device_map is {device}: {file.path} is of a frozen model, which runs on the CPU"
        )
    file.check(words=verify)

    def build_frozen() -> Model:
        model = build()
        base: Any = model.base_model
        base.encoder = nn.Module()
        if file.is_int8:
            words = base.embeddings.word_embeddings
            base.embeddings.word_embeddings = QuantizedEmbedding(
                words.num_embeddings, words.embedding_dim, words.padding_idx
            )
        return model

    model, plan = load_model(
        build_frozen, file, dtype=torch.float32, ignore_mismatched_sizes=ignore_mismatched_sizes
    )
    base: Any = model.base_model
    packed = file.packed_encoder(model.config, ACTIVATIONS[model.config.hidden_act])
    base.encoder = FrozenEncoder(packed, model.config.layer_norm_eps)
    return model, plan


def save_frozen(
    model: PreTrainedModel,
    directory: str | os.PathLike[str],
    tokenizer: XLMRobertaTokenizer | None = None,
) -> None:
    """Writes the folder; see ``PreTrainedModel.save_frozen``."""
    base: Any = model.base_model
    encoder = getattr(base, "encoder", None)
    if not isinstance(encoder, FrozenEncoder):
        raise ValueError(
            "save_frozen: the model is not frozen: call optimize_for_inference() first"
        )
    encoder.check_sources()
    if word_table(base.embeddings) is None:
        raise ValueError("save_frozen: the word embeddings are no plain table")
    others: dict[str, Tensor] = dict(model.named_parameters())
    others |= {name: b for name, b in model.named_buffers() if "word_embeddings." in name}
    for name, tensor in others.items():
        if tensor.dtype not in (torch.float32, torch.int8):
            raise ValueError(f"save_frozen: {name} is {tensor.dtype}; a frozen file holds float32")
    config = model.config_to_save()
    config.validate()
    refuse_other_weights(directory)
    if tokenizer is None and Path(model.name_or_path or ".no").is_dir():
        tokenizer = _tokenizer(model.name_or_path)

    def write(folder: Path) -> None:
        write_frozen_file(folder / FROZEN_NAME, encoder.packed, others, type(model).__name__)
        (folder / CONFIG_NAME).write_text(config.to_json_string(), encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)

    replace_checkpoint(prepare_folder(Path(directory)), write)


def refuse_other_weights(directory: str | os.PathLike[str]) -> None:
    """ValueError where a frozen file would lie beside weights, which are loaded before it."""
    if not Path(directory).is_dir():
        return
    try:
        found = find_weights(directory, {})
    except FileNotFoundError:
        return
    if found.name != FROZEN_NAME:
        raise ValueError(
            f"{directory} holds {found.name}, which would be loaded instead of {FROZEN_NAME}: give "
            "another folder"
        )


def _tokenizer(directory: str) -> XLMRobertaTokenizer | None:
    from xlmr_ext.tokenization import XLMRobertaTokenizer

    try:
        return XLMRobertaTokenizer.from_pretrained(directory)
    except FileNotFoundError:
        return None
