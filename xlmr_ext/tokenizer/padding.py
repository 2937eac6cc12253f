"""Padding, and columns of rows as lists, arrays or tensors."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from xlmr_ext.tokenizer.ranges import IntArray, bounds, spread

__all__ = ["as_column", "pad_examples", "padded_widths", "to_tensors"]

_UNLIMITED = 1_000_000_000  # a model_max_length above this is none


def padded_widths(
    lengths: IntArray, padding: str, max_length: int, multiple_of: int | None
) -> IntArray:
    """[rows] tokens after padding; a row that is longer than what is padded to stays as it is."""
    if padding == "do_not_pad":
        return lengths
    width = int(lengths.max(initial=0)) if padding == "longest" else max_length
    if multiple_of:
        width = -(-width // multiple_of) * multiple_of
    if width > _UNLIMITED:
        raise ValueError(
            'padding="max_length": this tokenizer has no model_max_length; pass max_length'
        )
    return np.maximum(lengths, width)


def as_column(name: str, flat: npt.NDArray[Any], widths: IntArray, kind: str | None) -> Any:
    """Rows that lie one after another as a list of lists, an array ("np") or a tensor ("pt").

    ``flat`` is [tokens, ...]; a row of pairs of numbers (spans) is a list of tuples.
    """
    if kind is None:
        values = flat.tolist() if flat.ndim == 1 else list(zip(*flat.T.tolist(), strict=True))
        ends = bounds(widths).tolist()
        return [values[a:b] for a, b in itertools.pairwise(ends)]
    different = len(np.unique(widths))
    if different > 1:
        raise _ragged(name, different, kind)
    width = int(widths[0]) if len(widths) else 0
    return _kind(flat.reshape(len(widths), width, *flat.shape[1:]), kind)


def to_tensors(name: str, values: Any, kind: str) -> Any:
    """Make one column, a list of rows or of numbers, an array ("np") or a torch tensor ("pt")."""
    rows: Any = list(values)
    lengths = {np.shape(row) for row in rows}
    if len(lengths) > 1:
        raise _ragged(name, len(lengths), kind)
    if not rows:  # no row has no length either
        flat = name in ("length", "overflow_to_sample_mapping")
        return _kind(np.zeros((0,) if flat else (0, 0), np.int64), kind)
    if isinstance(rows[0], np.ndarray):
        return _kind(np.stack(rows), kind)
    if kind == "np":
        return np.asarray(rows)
    import torch

    return torch.stack(rows) if isinstance(rows[0], torch.Tensor) else torch.tensor(rows)


def _kind(array: npt.NDArray[Any], kind: str) -> Any:
    if kind == "np":
        return array
    import torch

    return torch.from_numpy(array)


def _ragged(name: str, different: int, kind: str) -> ValueError:
    return ValueError(
        f'return_tensors="{kind}": the rows of {name} have {different} different lengths, '
        "so they form no tensor; pass padding=True (and truncation=True)"
    )


def pad_examples(
    encoded_inputs: Any,
    *,
    padding: str,
    max_length: int,
    multiple_of: int | None,
    side: str,
    pad_id: int,
    add_mask: bool,
    kind: str | None,
) -> dict[str, Any]:
    """Pad examples that were tokenized before; see ``XLMRobertaTokenizer.pad``."""
    columns, batched = _collect(encoded_inputs)
    if kind is None:
        kind = _kind_of(columns["input_ids"])
    lengths = np.fromiter(map(len, columns["input_ids"]), np.int64)
    if add_mask and "attention_mask" not in columns:
        columns["attention_mask"] = [np.ones(n, np.int64) for n in lengths]
    widths = padded_widths(lengths, padding, max_length, multiple_of)
    fills = {
        "input_ids": pad_id,
        "attention_mask": 0,
        "token_type_ids": 0,
        "special_tokens_mask": 1,
    }
    result: dict[str, Any] = {}
    for name, values in columns.items():
        if name in fills:
            rows = [np.asarray(row, np.int64) for row in values]
            flat = np.concatenate(rows) if rows else np.zeros(0, np.int64)
            if len(flat) != lengths.sum():
                raise ValueError(f"encoded_inputs[{name!r}]: not as long as input_ids")
            padded = spread(flat, lengths, widths, fills[name], side)
            column = as_column(name, padded, widths, kind if batched else None)
        else:
            column = to_tensors(name, values, kind) if kind and batched else list(values)
        if not batched:
            column = to_tensors(name, column[0], kind) if kind else column[0]
        result[name] = column
    return result


def _kind_of(rows: list[Any]) -> str | None:
    """Arrays stay arrays, and tensors tensors."""
    if rows and isinstance(rows[0], np.ndarray):
        return "np"
    return "pt" if rows and hasattr(rows[0], "new_zeros") else None


def _collect(inputs: Any) -> tuple[dict[str, list[Any]], bool]:
    """Read what ``pad`` accepts as columns: name to list of rows; and whether it is a batch.

    Accepts one example (a mapping to flat rows), a batch (a mapping to lists of rows), or a list of
    examples. Raises TypeError for anything else and ValueError for columns that do not agree.
    """
    if isinstance(inputs, Mapping):
        if "input_ids" not in inputs:
            raise ValueError(f"encoded_inputs: no 'input_ids' among {sorted(inputs)}")
        ids = inputs["input_ids"]
        batched = len(ids) == 0 or np.ndim(ids[0]) > 0
        columns = {key: list(value) if batched else [value] for key, value in inputs.items()}
    elif isinstance(inputs, (list, tuple)) and all(isinstance(item, Mapping) for item in inputs):
        batched = True
        keys = list(inputs[0]) if inputs else ["input_ids"]
        for index, item in enumerate(inputs):
            if set(item) != set(keys) or "input_ids" not in item:
                raise ValueError(
                    f"encoded_inputs[{index}]: has {sorted(item)}; expected the keys of the first "
                    f"example, {sorted(keys)}, with 'input_ids' among them"
                )
        columns = {key: [item[key] for item in inputs] for key in keys}
    else:
        raise TypeError(
            "encoded_inputs: expected a mapping with 'input_ids' or a list of such mappings, "
            f"got {type(inputs).__name__}"
        )
    rows = len(columns["input_ids"])
    for key, values in columns.items():
        if len(values) != rows:
            raise ValueError(f"encoded_inputs[{key!r}]: {len(values)} rows, input_ids has {rows}")
    return columns, batched
