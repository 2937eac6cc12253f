"""A checkpoint in BERT's layout, read as the XLM-R checkpoint that it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from xlmr_ext.formats.bert import convert_bert_shape, convert_bert_tensor, rename_bert
from xlmr_ext.formats.weights_file import WeightsFile

__all__ = ["BertWeights"]


class BertWeights:
    """The entries of ``weights`` under XLM-R's names and in its layout, converted one by one.

    Args:
        weights: of a model in BERT's layout.
        config: the content of its ``config.json``.

    Raises:
        ValueError: two entries are the same one; the message names the file.
    """

    def __init__(self, weights: WeightsFile, config: Mapping[str, Any]) -> None:
        self._weights = weights
        self.path = weights.path
        names = config.get("architectures")
        first = names[0] if isinstance(names, list) and names else None
        try:
            renamed = rename_bert(weights.shapes, first if isinstance(first, str) else None)
        except ValueError as error:
            raise ValueError(f"{weights.path}: {error}") from None
        self._source = {new: old for old, new in renamed.items()}
        self.shapes = {
            new: convert_bert_shape(new, weights.shapes[old]) for new, old in self._source.items()
        }

    def file_of(self, key: str) -> Path:
        return self._weights.file_of(self._source[key])

    def dtype(self, key: str) -> str:
        return self._weights.dtype(self._source[key])

    def read(self, key: str) -> Tensor:
        return convert_bert_tensor(key, self._weights.read(self._source[key])).contiguous()
