"""Labelled and unlabelled text from csv, tsv, jsonl and plain files, and batches by length.

Readers yield one :class:`Row` at a time and hold one row in memory, so a file of any size can
be streamed. Whatever is wrong with a file is said as ``file:line: what``.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import torch

    from xlmr_ext.packing import PackedBatch
    from xlmr_ext.tokenization import XLMRobertaTokenizer

Format = Literal["csv", "tsv", "jsonl", "txt"]
FORMATS: tuple[Format, ...] = ("csv", "tsv", "jsonl", "txt")

_SUFFIXES: dict[str, Format] = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".txt": "txt",
}
# Beyond this a column is not of labels but of numbers, names or texts. A head of that many labels
# is 16 MB, a confusion matrix of them 128 MB; ten times as many would be a hundred times that.
MAX_LABELS = 4096
# The csv module refuses fields beyond 128 KiB unless told otherwise. A bound stays, because an
# unclosed quote makes one field of the rest of the file.
_CSV_FIELD_LIMIT = 1 << 27
# csv refuses NUL before Python 3.11. A lone surrogate cannot come out of decoding UTF-8, so it
# can stand for NUL on the way through.
_CSV_REFUSES_NUL = sys.version_info < (3, 11)
_NUL_STAND_IN = "\udc00"


class DataError(ValueError):
    """A file or a row that cannot be read as asked; the message begins with ``file:line``."""


class Row(NamedTuple):
    """One row of a file: ``pair`` and ``label`` are None where no such column was asked for."""

    text: str
    pair: str | None
    label: str | None
    line: int


@dataclass(frozen=True)
class Places:
    """Where rows came from, called with a row's number: ``file:line``, or ``data[index]``."""

    source: str
    lines: list[int] | None

    def __call__(self, index: int) -> str:
        if self.lines is None:
            return f"{self.source}[{index}]"
        return f"{self.source}:{self.lines[index]}"


@dataclass(frozen=True)
class LabelledTexts:
    """Texts with their labels, and where each came from.

    Args:
        texts: n texts; an empty text is allowed.
        labels: n label names.
        pairs: the second text of each row, or None.
        source: what the messages call it, usually the file's name.
        lines: line of each row in ``source``, or None.
    """

    texts: list[str]
    labels: list[str]
    pairs: list[str] | None = None
    source: str = "data"
    lines: list[int] | None = None

    def __post_init__(self) -> None:
        for name, column in (("labels", self.labels), ("pairs", self.pairs), ("lines", self.lines)):
            if column is not None and len(column) != len(self.texts):
                raise ValueError(
                    f"{name} of {self.source} has {len(column)} entries, expected "
                    f"{len(self.texts)}, one for each text"
                )

    def __len__(self) -> int:
        return len(self.texts)

    def where(self, index: int) -> str:
        """``file:line`` of a row, or ``data[index]`` where it came from no file."""
        return self.places(index)

    @property
    def places(self) -> Places:
        """:meth:`where` without the texts."""
        return Places(self.source, self.lines)

    @classmethod
    def of(cls, rows: Iterable[tuple[str, str | int]], source: str = "data") -> LabelledTexts:
        """From (text, label) tuples; integer labels become their decimal text."""
        texts, labels = [], []
        for index, row in enumerate(rows):
            where = f"{source}[{index}]"
            if not isinstance(row, tuple | list) or len(row) != 2:
                raise TypeError(f"{where} must be a (text, label) pair, got {type(row).__name__}")
            if not isinstance(row[0], str):
                raise TypeError(f"{where}: text must be a str, got {type(row[0]).__name__}")
            texts.append(row[0])
            labels.append(_label(row[1], where))
        return cls(texts, labels, source=source)


def guess_format(path: str | Path) -> Format:
    """The format that a file's suffix names; ValueError where it names none."""
    suffix = Path(path).suffix.lower()
    if suffix not in _SUFFIXES:
        raise ValueError(
            f"cannot tell the format of {path} by its suffix {suffix!r}: expected one of "
            f"{', '.join(_SUFFIXES)}, or name the format"
        )
    return _SUFFIXES[suffix]


def read_rows(
    source: str | Path | BinaryIO,
    *,
    format: Format | None = None,
    text_column: str = "text",
    pair_column: str | None = None,
    label_column: str | None = None,
    name: str | None = None,
    errors: Literal["strict", "replace"] = "strict",
) -> Iterator[Row]:
    """Yields the rows of a file or a binary stream in order, holding one at a time.

    * ``csv``: quoted as in RFC 4180, a header line; blank lines are skipped.
    * ``tsv``: split on line feeds and tabs alone, no quoting, a header line; blank lines are
      skipped unless the text is the only column.
    * ``jsonl``: a JSON object a line; blank lines are skipped.
    * ``txt``: a text a line, split on line feeds alone; an empty line is an empty text.

    All are UTF-8, with or without a byte order mark; a carriage return before the line feed is
    dropped. Labels lose surrounding white space, texts are left as they are.

    Args:
        format: None goes by the suffix.
        label_column: None reads no labels.
        name: what messages call the source; None takes the path.
        errors: ``"replace"`` reads bytes that are not UTF-8 as U+FFFD.

    Raises:
        DataError: naming ``file:line``, for a missing column, a malformed row, an empty label
            or bytes that are not UTF-8.
        OSError: where the file cannot be opened or read.
    """
    if isinstance(source, str | Path):
        chosen = guess_format(source) if format is None else format
        name = str(source) if name is None else name
        with Path(source).open("rb") as stream:
            yield from read_rows(
                stream,
                format=chosen,
                text_column=text_column,
                pair_column=pair_column,
                label_column=label_column,
                name=name,
                errors=errors,
            )
        return
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    name = getattr(source, "name", "input") if name is None else name
    wanted = [text_column]
    wanted += [] if pair_column is None else [pair_column]
    wanted += [] if label_column is None else [label_column]
    lines = text_lines(source, str(name), errors)
    if format == "txt":
        if len(wanted) > 1:
            raise ValueError(
                f"{name} is plain text, which has no column {wanted[1]!r}: "
                "use csv, tsv or jsonl where there is more than a text"
            )
        for number, line in enumerate(lines, 1):
            yield Row(_chomp(line), None, None, number)
        return
    read = {"csv": _csv_values, "tsv": _tsv_values, "jsonl": _jsonl_values}[format]
    for number, values in read(lines, str(name), wanted):
        rest = iter(values[1:])
        pair = None if pair_column is None else next(rest)
        label = None if label_column is None else _label(next(rest), f"{name}:{number}")
        for column, value in ((text_column, values[0]), (pair_column, pair)):
            if column is not None and not isinstance(value, str):
                raise DataError(
                    f"{name}:{number}: column {column!r} must hold a text, got {kind_of(value)}"
                )
        yield Row(values[0], pair, label, number)


def read_labelled(
    path: str | Path,
    *,
    format: Format | None = None,
    text_column: str = "text",
    label_column: str = "label",
    pair_column: str | None = None,
    errors: Literal["strict", "replace"] = "strict",
) -> LabelledTexts:
    """Reads a whole labelled file; see :func:`read_rows`.

    Raises:
        DataError: where it has no rows, or more than :data:`MAX_LABELS` different labels.
    """
    rows: list[Row] = []
    seen: set[str | None] = set()
    for row in read_rows(
        path,
        format=format,
        text_column=text_column,
        pair_column=pair_column,
        label_column=label_column,
        errors=errors,
    ):
        rows.append(row)
        seen.add(row.label)
        if len(seen) > MAX_LABELS:
            raise _too_many_labels(f"{path}:{row.line}", row.label or "")
    if not rows:
        raise DataError(f"{path} has no rows")
    return LabelledTexts(
        texts=[row.text for row in rows],
        labels=[row.label or "" for row in rows],
        pairs=None if pair_column is None else [row.pair or "" for row in rows],
        source=str(path),
        lines=[row.line for row in rows],
    )


def label_list(labels: Iterable[str]) -> list[str]:
    """The different labels, sorted: by value where all are integers, else by code point."""
    distinct = set(labels)
    try:
        return sorted(distinct, key=lambda label: (int(label), label))
    except ValueError:
        return sorted(distinct)


def training_labels(data: LabelledTexts) -> list[str]:
    """The different labels, as :func:`label_list` sorts them, where a classifier can learn them.

    Raises:
        DataError: one label only, or more than :data:`MAX_LABELS`.
    """
    seen: set[str] = set()
    for position, label in enumerate(data.labels):
        seen.add(label)
        if len(seen) > MAX_LABELS:
            raise _too_many_labels(data.where(position), label)
    if len(seen) < 2:
        raise DataError(
            f"{data.source} has one class only, {data.labels[0]!r}, from {data.where(0)} to "
            f"{data.where(len(data) - 1)}: a classifier needs rows of at least 2"
        )
    return label_list(seen)


def label_ids(data: LabelledTexts, labels: Sequence[str]) -> list[int]:
    """Index of each row's label in ``labels``; DataError names the first row that has no such."""
    index = {label: position for position, label in enumerate(labels)}
    for position, label in enumerate(data.labels):
        if label not in index:
            raise unknown_label(data.where(position), label, labels)
    return [index[label] for label in data.labels]


def unknown_label(where: str, label: str, labels: Sequence[str]) -> DataError:
    """The error of a row whose label is none of the model's ``labels``."""
    shown = ", ".join(repr(known) for known in labels[:20])
    more = "" if len(labels) <= 20 else f" and {len(labels) - 20} more"
    return DataError(
        f"{where}: label {label!r} is not one of the model's {len(labels)} labels: {shown}{more}"
    )


class LengthBatches:
    """Batches of rows of similar length, in an order that a seed decides.

    An epoch's rows are shuffled, cut into buckets of ``bucket_batches`` batches, sorted by
    length within each bucket, cut into batches, and the batches shuffled. Small buckets keep
    batches mixed; with ``bucket_batches=1``, the default, length plays no part: a packed batch
    has no padding for sorting to save, and mixed batches learn better. Nothing is dropped: one
    batch an epoch may be smaller than ``batch_size``.

    Args:
        lengths: number of tokens of each row.
        batch_size: rows a batch.
        seed: the same seed gives the same batches on every machine.
    """

    def __init__(
        self, lengths: Sequence[int], batch_size: int, *, seed: int, bucket_batches: int = 1
    ) -> None:
        for name, value in (("batch_size", batch_size), ("bucket_batches", bucket_batches)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        self._lengths = np.asarray(lengths, dtype=np.int64)
        self._batch_size = batch_size
        self._bucket_size = batch_size * bucket_batches
        self._seed = seed

    def __len__(self) -> int:
        """Batches an epoch."""
        return -(-len(self._lengths) // self._batch_size)

    def epoch(self, number: int) -> list[list[int]]:
        """The batches of one epoch as row indices; a function of the seed and ``number`` alone."""
        random = np.random.default_rng([self._seed, number])
        order = random.permutation(len(self._lengths))
        batches: list[list[int]] = []
        for start in range(0, len(order), self._bucket_size):
            bucket = order[start : start + self._bucket_size]
            bucket = bucket[np.argsort(self._lengths[bucket], kind="stable")]
            for first in range(0, len(bucket), self._batch_size):
                batches.append([int(row) for row in bucket[first : first + self._batch_size]])
        return [batches[index] for index in random.permutation(len(batches))]


def encode(
    tokenizer: XLMRobertaTokenizer,
    texts: Sequence[str],
    pairs: Sequence[str] | None = None,
    *,
    max_length: int,
) -> list[list[int]]:
    """Token ids of each text, special tokens included, cut to ``max_length`` tokens."""
    if not texts:
        return []
    first = list(texts)
    encoded = (
        tokenizer(first, truncation=True, max_length=max_length)
        if pairs is None
        else tokenizer(first, list(pairs), truncation=True, max_length=max_length)
    )
    sequences: list[list[int]] = encoded["input_ids"]
    return sequences


def check_vocabulary(sequences: Iterable[Sequence[int]], vocab_size: int) -> None:
    """ValueError where a token id lies beyond the model's vocabulary."""
    for sequence in sequences:
        if sequence and (min(sequence) < 0 or max(sequence) >= vocab_size):
            bad = next(token for token in sequence if not 0 <= token < vocab_size)
            raise ValueError(
                f"the tokenizer and the model do not belong together: token id {bad} is outside "
                f"the model's vocabulary of {vocab_size}"
            )


def packed(
    sequences: Sequence[Sequence[int]],
    rows: Sequence[int],
    *,
    pad_token_id: int,
    device: torch.device | None = None,
) -> PackedBatch:
    """The chosen rows as one batch without padding."""
    from xlmr_ext.packing import PackedBatch

    return PackedBatch.from_sequences(
        [list(sequences[row]) for row in rows], pad_token_id=pad_token_id, device=device
    )


def text_lines(stream: BinaryIO, name: str, errors: str = "strict") -> Iterator[str]:
    """The lines of a UTF-8 stream, as they are; DataError for bytes that are not UTF-8."""
    # Splitting bytes, not text: U+0085, U+2028 and their like are part of a text.
    for number, raw in enumerate(stream, 1):
        try:
            line = raw.decode("utf-8", errors)
        except UnicodeDecodeError as error:
            hint = ", it looks like UTF-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
            raise DataError(
                f"{name}:{number}: not UTF-8 (byte 0x{raw[error.start]:02x} at position "
                f"{error.start} of the line){hint}; save the file as UTF-8"
            ) from None
        yield line.removeprefix("\ufeff") if number == 1 else line


def _chomp(line: str) -> str:
    return line.removesuffix("\n").removesuffix("\r")


def _columns(header: Sequence[str], wanted: Sequence[str], where: str) -> list[int]:
    names = [column.strip() for column in header]
    for column in wanted:
        if names.count(column) != 1:
            fault = "has no column" if column not in names else "has more than one column"
            raise DataError(f"{where}: {fault} {column!r}; its columns are {_shown(names)}")
    return [names.index(column) for column in wanted]


def _shown(names: Sequence[str]) -> str:
    shown = [repr(name if len(name) <= 60 else name[:57] + "...") for name in names[:20]]
    return ", ".join(shown) + ("" if len(names) <= 20 else f" and {len(names) - 20} more")


def _fields(row: Sequence[str], header: Sequence[str], places: Sequence[int], where: str) -> Any:
    if len(row) != len(header):
        raise DataError(f"{where}: {len(row)} columns, expected {len(header)} as in the header")
    return [row[place] for place in places]


def _csv_values(
    lines: Iterator[str], name: str, wanted: Sequence[str]
) -> Iterator[tuple[int, list[Any]]]:
    if csv.field_size_limit() < _CSV_FIELD_LIMIT:
        csv.field_size_limit(_CSV_FIELD_LIMIT)
    if _CSV_REFUSES_NUL:
        lines = (line.replace("\0", _NUL_STAND_IN) for line in lines)
    # strict: without it an unclosed quote swallows the rest of the file in silence.
    reader = csv.reader(lines, strict=True)
    header: list[str] = []
    places: list[int] = []
    while True:
        number = reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{name}:{number}: malformed csv: {error}") from None
        if row is None:
            break
        if not row:
            continue
        if _CSV_REFUSES_NUL:
            row = [field.replace(_NUL_STAND_IN, "\0") for field in row]
        if not places:
            header, places = row, _columns(row, wanted, f"{name}:{number}")
        else:
            yield number, _fields(row, header, places, f"{name}:{number}")
    if not places:
        raise DataError(f"{name} is empty, expected a header line with column {wanted[0]!r}")


def _tsv_values(
    lines: Iterator[str], name: str, wanted: Sequence[str]
) -> Iterator[tuple[int, list[Any]]]:
    first = next(lines, None)
    if first is None:
        raise DataError(f"{name} is empty, expected a header line with column {wanted[0]!r}")
    header = _chomp(first).split("\t")
    places = _columns(header, wanted, f"{name}:1")
    for number, line in enumerate(lines, 2):
        row = _chomp(line).split("\t")
        if row == [""] and len(header) > 1:
            continue
        yield number, _fields(row, header, places, f"{name}:{number}")


def json_objects(lines: Iterator[str], name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and JSON object of every line that is not blank; DataError for anything else."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{name}:{number}: malformed JSON: {error}") from None
        if not isinstance(row, dict):
            raise DataError(f"{name}:{number}: expected a JSON object, got {kind_of(row)}")
        yield number, row


def _jsonl_values(
    lines: Iterator[str], name: str, wanted: Sequence[str]
) -> Iterator[tuple[int, list[Any]]]:
    for number, row in json_objects(lines, name):
        for column in wanted:
            if column not in row:
                raise DataError(
                    f"{name}:{number}: has no column {column!r}; it has {_shown(list(row))}"
                )
        yield number, [row[column] for column in wanted]


def _too_many_labels(where: str, label: str) -> DataError:
    return DataError(
        f"{where}: {label[:60]!r} is label number {MAX_LABELS + 1}, and a classifier takes at most "
        f"{MAX_LABELS}: is the column of labels the right one?"
    )


def _label(value: Any, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise DataError(f"{where}: a label must be a string or an integer, got {kind_of(value)}")
    label = str(value).strip()
    if not label:
        raise DataError(f"{where}: the label is empty")
    return label


def kind_of(value: Any) -> str:
    """What a value is, for a message."""
    if value is None:
        return "null"
    return f"{type(value).__name__} {str(value)[:40]}"
