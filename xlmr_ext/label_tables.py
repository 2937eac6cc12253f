"""The labels of a configuration: ``id2label`` and ``label2id``, from whatever part is given."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

__all__ = ["are_settled", "is_integer", "label_tables", "labels_of_file", "short"]

logger = logging.getLogger(__name__)

_KEYS = ("num_labels", "id2label", "label2id")
_MAX_LABELS = 10**6


def short(value: object) -> str:
    """A value for an error message: its text, cut, and its type."""
    # str() of an integer of more than 4300 digits raises; nothing that long is worth printing.
    if isinstance(value, int) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return f"{text[:80]}{'...' if len(text) > 80 else ''} ({type(value).__name__})"


def is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _label_index(key: object) -> int:
    if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 10:
        return int(key)
    if is_integer(key):
        assert isinstance(key, int)
        return key
    raise ValueError(f"a label's number must be an integer >= 0, got {short(key)}")


def label_tables(
    num_labels: int | None, id2label: Mapping[Any, str] | None, label2id: Mapping[str, Any] | None
) -> tuple[dict[int, str], dict[str, int]]:
    """Both label tables from whatever part of them is given; they never contradict each other."""
    if num_labels is not None and not is_integer(num_labels):
        raise TypeError(f"num_labels must be an integer, got {short(num_labels)}")
    if num_labels is not None and not 1 <= num_labels <= _MAX_LABELS:
        raise ValueError(f"num_labels must be 1 to {_MAX_LABELS}, got {short(num_labels)}")
    for name, table in (("id2label", id2label), ("label2id", label2id)):
        if table is not None and not isinstance(table, Mapping):
            raise TypeError(f"{name} must be a mapping, got {short(table)}")
    inverse = None
    if label2id is not None:
        inverse = {_label_index(index): str(label) for label, index in label2id.items()}
        if len(inverse) != len(label2id):
            numbers = [_label_index(index) for index in label2id.values()]
            shared = next(number for number in numbers if numbers.count(number) > 1)
            raise ValueError(f"label2id gives two labels the number {shared}")
    if id2label is not None:
        table = {_label_index(index): str(label) for index, label in id2label.items()}
        if inverse is not None and inverse != table:
            raise ValueError(
                f"id2label and label2id contradict each other: {short(table)}, {short(inverse)}"
            )
    elif inverse is not None:
        table = inverse
    else:
        table = {
            index: f"LABEL_{index}" for index in range(2 if num_labels is None else num_labels)
        }
    if len(table) > _MAX_LABELS:
        raise ValueError(f"at most {_MAX_LABELS} labels are accepted, got {len(table)}")
    table = dict(sorted(table.items()))
    if not table or list(table) != list(range(len(table))):
        raise ValueError(
            f"the numbers of the labels must be 0, 1, 2, ... without a gap, got {list(table)[:20]}"
        )
    if num_labels is not None and num_labels != len(table):
        raise ValueError(
            f"num_labels = {num_labels} contradicts the {len(table)} labels that were given"
        )
    reverse = {label: index for index, label in table.items()}
    if len(reverse) != len(table):
        twice = next(label for index, label in table.items() if reverse[label] != index)
        raise ValueError(f"id2label has the label {short(twice)} twice")
    return table, reverse


def are_settled(id2label: object, label2id: object) -> bool:
    """Whether two tables are as :func:`label_tables` gives them; quick, also for a million."""
    return (
        isinstance(id2label, dict)
        and isinstance(label2id, dict)
        and 0 < len(id2label) == len(label2id) <= _MAX_LABELS
        and all(
            type(index) is int
            and index == place
            and type(label) is str
            and type(label2id.get(label)) is int
            and label2id[label] == place
            for place, (index, label) in enumerate(id2label.items())
        )
    )


def labels_of_file(values: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The file's label keys as they stand beside the overrides: None where they no longer count."""
    given = {key for key in _KEYS if overrides.get(key) is not None}
    from_file = {key: values.get(key) for key in _KEYS}
    if given:
        tables = from_file["id2label"] or from_file["label2id"]
        named = len(tables) if isinstance(tables, Mapping) else None
        if given == {"num_labels"} and overrides["num_labels"] == named:
            return {**from_file, "num_labels": None}
        return dict.fromkeys(_KEYS)
    if from_file["id2label"] is not None and from_file["label2id"] is not None:
        # Files exist whose label2id was left behind by an edit of id2label; the class numbers of
        # the head are id2label's.
        try:
            label_tables(None, from_file["id2label"], from_file["label2id"])
        except ValueError:
            logger.warning("label2id of the configuration contradicts id2label and is ignored")
        from_file["label2id"] = None  # it follows from id2label
    return from_file
