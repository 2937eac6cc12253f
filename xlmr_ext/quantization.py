"""Symmetric 8-bit weights: w is about q s, with one scale s a row and q in [-127, 127].

The rounding of Jacob et al. 2018, "Quantization and training of neural networks for efficient
integer-arithmetic-only inference" (arXiv 1712.05877, section 2.1), with zero point 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["QuantizedEmbedding", "quantize_rows"]

_LARGEST = 127
# Rows that are converted at once: the float copies stay small beside a table of 250,000.
_ROWS = 4096


def quantize_rows(weight: Tensor, name: str = "weight") -> tuple[Tensor, Tensor]:
    """Rounds each row to multiples of its scale, max |w| / 127, ties to even.

    So |w - q s| <= s / 2, up to the rounding of float32.

    Args:
        weight: [rows, columns], floating.
        name: what a message calls it.

    Returns:
        q, int8 [rows, columns] in [-127, 127], and s, float32 [rows]; both 0 for a row of zeros.

    Raises:
        ValueError: a weight is NaN or infinite.
    """
    weight = weight.detach()
    codes = torch.empty(weight.shape, dtype=torch.int8)
    scale = torch.empty(weight.shape[0], dtype=torch.float32)
    for begin in range(0, weight.shape[0], _ROWS):
        part = weight[begin : begin + _ROWS].to(torch.float32)
        s = part.abs().amax(1) / _LARGEST
        if not bool(torch.isfinite(s).all()):
            row = begin + int((~torch.isfinite(s)).nonzero()[0])
            raise ValueError(f"{name}: row {row} is not finite, so it has no 8-bit form")
        scaled = part / s.where(s > 0, 1.0)[:, None]
        codes[begin : begin + _ROWS] = scaled.round_().clamp_(-_LARGEST, _LARGEST)
        scale[begin : begin + _ROWS] = s
    return codes, scale


class QuantizedEmbedding(nn.Module):
    """A table of embeddings in 8 bits, read by row; it has no parameters and no ``weight``.

    Args:
        num_embeddings, embedding_dim: rows, and numbers in each.
        padding_idx: the row of padding, as ``nn.Embedding`` has it.

    Attributes:
        codes: int8 [rows, columns].
        scale: float32 [rows].
    """

    codes: Tensor
    scale: Tensor

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int | None) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = padding_idx
        self.register_buffer("codes", torch.empty(num_embeddings, embedding_dim, dtype=torch.int8))
        self.register_buffer("scale", torch.empty(num_embeddings))

    @classmethod
    def of(cls, embedding: nn.Embedding, name: str = "word_embeddings") -> QuantizedEmbedding:
        """The table of an embedding; ValueError where a weight is not finite."""
        with torch.device("meta"):
            made = cls(embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx)
        made.codes, made.scale = quantize_rows(embedding.weight, name)
        return made.eval()

    def forward(self, input: Tensor) -> Tensor:
        """Ids [...] to float32 [..., columns]."""
        return self.codes[input] * self.scale[input][..., None]

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            raise AttributeError(
                "the word embeddings are 8-bit rows without a weight: call them on ids for float "
                "rows, or load the checkpoint that they were made from"
            )
        return super().__getattr__(name)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, padding_idx={self.padding_idx}"
