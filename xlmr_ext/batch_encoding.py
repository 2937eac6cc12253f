"""What a tokenizer returns: columns of token ids and masks, padded and made into arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

__all__ = [
    "BatchEncoding",
    "IntArray",
    "collect",
    "finish",
    "pad_rows",
    "padded_width",
    "to_tensors",
]

IntArray = npt.NDArray[np.int64]


class BatchEncoding(dict[str, Any]):
    """A dict of columns whose keys are attributes too: ``batch["input_ids"] is batch.input_ids``.

    It unpacks into a model's arguments (``model(**batch)``) and moves between devices (`to`).
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(
                f"BatchEncoding has no {name!r}; it holds {', '.join(self) or 'nothing'}"
            ) from None

    def to(self, device: torch.device | str | int, *, non_blocking: bool = False) -> BatchEncoding:
        """Move every torch tensor to ``device``, in place; returns itself.

        Raises ValueError where there are columns but no tensor among them.
        """
        tensors = [key for key, value in self.items() if hasattr(value, "to")]
        if self and not tensors:
            raise ValueError(
                f"to({device!r}): the columns {', '.join(self)} are not torch tensors; "
                'ask the tokenizer for return_tensors="pt"'
            )
        for key in tensors:
            self[key] = self[key].to(device, non_blocking=non_blocking)
        return self


def padded_width(
    lengths: Sequence[int], padding: str, max_length: int, multiple_of: int | None
) -> int:
    """How many tokens a padded row has; 0 for ``padding="do_not_pad"``."""
    if padding == "do_not_pad":
        return 0
    width = max(lengths, default=0) if padding == "longest" else max_length
    return -(-width // multiple_of) * multiple_of if multiple_of else width


def pad_rows(rows: Sequence[npt.NDArray[Any]], width: int, fill: int, side: str) -> list[IntArray]:
    """Fill each row up to ``width`` on ``side``; a row that is as long or longer stays as it is."""
    padded = []
    for row in rows:
        missing = width - len(row)
        if missing > 0:
            full = np.full(width, fill, np.int64)
            if side == "right":
                full[: len(row)] = row
            else:
                full[missing:] = row
            padded.append(full)
        else:
            padded.append(np.asarray(row, np.int64))
    return padded


def to_tensors(name: str, values: Any, kind: str) -> Any:
    """Make one column, a list of rows or of numbers, an array ("np") or a torch tensor ("pt")."""
    rows: Any = list(values)
    lengths = {np.shape(row) for row in rows}
    if len(lengths) > 1:
        raise ValueError(
            f'return_tensors="{kind}": the rows of {name} have {len(lengths)} different lengths, '
            "so they form no tensor; pass padding=True (and truncation=True)"
        )
    if not rows:  # no row has no length either
        rows = np.zeros((0,) if name == "length" else (0, 0), np.int64)
    elif isinstance(rows[0], np.ndarray):
        rows = np.stack(rows)
    if kind == "np":
        return np.asarray(rows)
    import torch

    if isinstance(rows, np.ndarray):
        return torch.from_numpy(rows)
    return torch.stack(list(rows)) if isinstance(rows[0], torch.Tensor) else torch.tensor(rows)


def collect(inputs: Any) -> tuple[dict[str, list[Any]], bool]:
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


def finish(columns: dict[str, Any], return_tensors: str | None, batched: bool) -> BatchEncoding:
    """Columns of arrays as a batch: of tensors, or of lists, those of the one row if unbatched."""
    if return_tensors is not None:
        return BatchEncoding(
            {name: to_tensors(name, rows, return_tensors) for name, rows in columns.items()}
        )
    lists = {
        name: [row.tolist() if isinstance(row, np.ndarray) else row for row in rows]
        for name, rows in columns.items()
    }
    return BatchEncoding(lists if batched else {name: rows[0] for name, rows in lists.items()})
