"""Another number of rows for a table of embeddings."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

# transformers' scale of the covariance that new rows are drawn with.
_SHARE = 1e-9
_BLOCK = 64  # new rows at a time: what is drawn for them is as long as the table


def resize(
    embedding: nn.Module, rows: int, mean: bool, initialise: Callable[[nn.Module], None]
) -> None:
    """Changes the rows of a table in place; those that stay keep their values.

    Args:
        embedding: an ``nn.Embedding``; its padding row stays.
        rows: the number wanted.
        mean: draw new rows near the mean of the old ones, from N(mean, 1e-9 covariance), as
            transformers does (Hewitt 2021, "Initializing new word embeddings for pretrained
            language models"); else ``initialise`` fills them.
        initialise: fills a new module of the same type.

    Raises:
        TypeError: ``embedding`` is of another type.
        ValueError: ``rows`` would cut off the padding row.
    """
    if type(embedding) is not nn.Embedding:
        raise TypeError(
            f"the word embeddings are {type(embedding).__name__}; expected torch.nn.Embedding "
            "(resize them before peft or another library replaces them)"
        )
    padding = embedding.padding_idx
    if padding is not None and rows <= padding:
        raise ValueError(f"{rows} rows are too few: row {padding} is padding's")
    old = embedding.weight.detach()
    added = rows - old.shape[0]
    if added == 0:
        return
    new = nn.Embedding(rows, old.shape[1], padding, device=old.device, dtype=old.dtype)
    if added > 0 and not mean:
        initialise(new)
    _fill(new.weight, old, mean)
    _put(embedding.weight, new.weight)
    embedding.num_embeddings = rows


def resize_decoder(
    decoder: nn.Linear, rows: int, mean: bool, initialise: Callable[[nn.Module], None]
) -> None:
    """The same for a map onto the vocabulary, whose matrix may be that of embeddings that have
    ``rows`` rows already. A new word's bias is near the mean of the biases, or 0."""
    weight = decoder.weight.detach()
    if weight.shape[0] != rows:
        new = nn.Linear(weight.shape[1], rows, bias=False, device=weight.device, dtype=weight.dtype)
        if not mean:
            initialise(new)
        _fill(new.weight, weight, mean)
        _put(decoder.weight, new.weight)
    resize_bias(decoder.bias, rows, mean)
    decoder.out_features = rows


def resize_bias(bias: nn.Parameter, rows: int, mean: bool) -> None:
    """Changes the length of a bias in place; nothing where it has that length."""
    old = bias.detach()
    if old.shape[0] != rows:
        new = old.new_zeros(rows)
        _fill(new[:, None], old[:, None], mean)
        _put(bias, new)


def _fill(new: Tensor, old: Tensor, mean: bool) -> None:
    """Copies the rows that stay; the others are drawn near the mean, or stay as they are."""
    rows, kept = new.shape[0], old.shape[0]
    with torch.no_grad():
        new[:kept] = old[:rows]
        if mean:
            for first in range(kept, rows, _BLOCK):
                part = new[first : first + _BLOCK]
                part.copy_(_near_the_mean(old, part.shape[0]))


def _put(parameter: Tensor, new: Tensor) -> None:
    # The parameter itself stays, for optimizers that hold it.
    parameter.grad = None
    parameter.data = new.data


def _near_the_mean(table: Tensor, count: int) -> Tensor:
    """[count, width] from N(mean, 1e-9 covariance) of the rows of a table.

    With z ~ N(0, I), (table - mean)^T z / sqrt(rows) has the table's covariance: none is formed.
    """
    rows = table.shape[0]
    wide = table.to(torch.promote_types(table.dtype, torch.float32))
    mean = wide.mean(0)
    z = torch.randn(count, rows, dtype=wide.dtype, device=wide.device)
    # z (table - mean) = (z - its mean) table: no second table either.
    return mean + math.sqrt(_SHARE / rows) * ((z - z.mean(1, keepdim=True)) @ wide)
