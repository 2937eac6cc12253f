"""Sentences whose words carry IOB2 tags, from files with a word a line; and entities of tags.

In IOB2 the first word of an entity of type X is tagged ``B-X``, the others of it ``I-X``, all other
words ``O`` (Tjong Kim Sang and Veenstra 1999). Whatever is wrong with a file is said as
``file:line: what``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

from xlmr_ext.data import DataError, text_lines

__all__ = [
    "TaggedSentence",
    "TaggedSentences",
    "entity_spans",
    "read_iob2",
    "read_sentences",
    "to_iob2",
]

Errors = Literal["strict", "repair", "ignore"]

_IOB2 = re.compile(r"O|[BI]-.+", re.DOTALL)
_REPAIRABLE = re.compile(r"O|[BIES]-.+", re.DOTALL)
_ANYTHING = re.compile(".+", re.DOTALL)
_PREFIXES = ("B", "I", "E", "S")
_BLANKS = " \t\r\n"  # Other white space, such as U+00A0, may be a word.
_SPACES = re.compile("[ \t]+")


class TaggedSentence(NamedTuple):
    """Words, their tags, and the line of each in its file."""

    words: list[str]
    tags: list[str]
    lines: list[int]


@dataclass(frozen=True)
class TaggedSentences:
    """Sentences as words with a tag each, and where they came from.

    Args:
        words: n sentences.
        tags: IOB2 tags, one a word.
        source: what the messages call it, usually the file's name.
        lines: line of each word in ``source``, or None.
    """

    words: list[list[str]]
    tags: list[list[str]]
    source: str = "data"
    lines: list[list[int]] | None = None

    def __post_init__(self) -> None:
        sizes = [len(words) for words in self.words]
        for name, column in (("tags", self.tags), ("lines", self.lines)):
            if column is not None and [len(row) for row in column] != sizes:
                raise ValueError(f"{name} of {self.source} must be one a word of every sentence")

    def __len__(self) -> int:
        return len(self.words)

    def where(self, sentence: int, word: int = 0) -> str:
        """``file:line`` of a word, or ``data[sentence][word]`` where it came from no file."""
        if self.lines is None:
            return f"{self.source}[{sentence}][{word}]"
        return f"{self.source}:{self.lines[sentence][word]}"

    @classmethod
    def of(
        cls, sentences: Iterable[tuple[Sequence[str], Sequence[str]]], source: str = "data"
    ) -> TaggedSentences:
        """From (words, tags) of each sentence; ValueError where the tags are not IOB2."""
        all_words, all_tags = [], []
        for index, (words, tags) in enumerate(sentences):
            if isinstance(words, str) or not all(isinstance(word, str) for word in words):
                raise TypeError(
                    f"{source}[{index}]: the words must be a list of str, got {words!r}"
                )
            if len(words) != len(tags):
                raise ValueError(f"{source}[{index}]: {len(words)} words but {len(tags)} tags")
            _check(tags, lambda word, index=index: f"{source}[{index}][{word}]")  # type: ignore[misc]
            all_words.append(list(words))
            all_tags.append(list(tags))
        return cls(all_words, all_tags, source)


def entity_spans(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """The entities of one sentence: (type, first word, word after the last).

    The rules are those of conlleval, and of seqeval where it is not strict: an entity begins at
    ``B-X``, and at ``I-X`` that does not continue an entity of type X; so every sequence of tags
    has entities. ``S-X`` (alone) and ``E-X`` (last) of the scheme IOBES are understood too; any
    other tag is outside of entities.
    """
    spans: list[tuple[str, int, int]] = []
    kind, begin, open_ended = "", 0, False
    for place, tag in enumerate([*tags, "O"]):
        prefix, _, name = tag.partition("-")
        continues = open_ended and prefix in ("I", "E") and name == kind
        if not continues and kind:
            spans.append((kind, begin, place))
            kind = ""
        if prefix in _PREFIXES and not continues:
            kind, begin = name, place
        open_ended = prefix in ("B", "I")
    return spans


def to_iob2(tags: Sequence[str]) -> list[str]:
    """The tags of the same :func:`entity_spans` in IOB2; takes IOB1, IOB2 and IOBES."""
    fixed = ["O"] * len(tags)
    for kind, first, end in entity_spans(tags):
        fixed[first:end] = [f"B-{kind}"] + [f"I-{kind}"] * (end - first - 1)
    return fixed


def read_iob2(
    path: str | Path,
    *,
    token_column: int | None = None,
    tag_column: int | None = None,
    errors: Errors = "strict",
) -> TaggedSentences:
    """Reads a whole file; see :func:`read_sentences`. DataError where it has no sentence."""
    sentences = list(
        read_sentences(path, token_column=token_column, tag_column=tag_column, errors=errors)
    )
    if not sentences:
        raise DataError(f"{path} has no sentences")
    return TaggedSentences(
        words=[sentence.words for sentence in sentences],
        tags=[sentence.tags for sentence in sentences],
        source=str(path),
        lines=[sentence.lines for sentence in sentences],
    )


def read_sentences(
    source: str | Path | BinaryIO,
    *,
    token_column: int | None = None,
    tag_column: int | None = None,
    errors: Errors = "strict",
    name: str | None = None,
) -> Iterator[TaggedSentence]:
    """Yields the sentences of a file or a binary stream in order, holding one at a time.

    A word a line, an empty line after each sentence, UTF-8. Columns are parted by tabs where the
    first word's line has one, else by runs of blanks, and are as many in every line. Where they are
    parted by tabs, are 3 or more, and the first counts the words of the first sentence from 1
    (Universal NER, GermEval), the second is the word and the third the tag; else the first is the
    word and the last the tag (CoNLL-2003). ``-DOCSTART-`` lines are skipped, and comments: lines
    that begin with ``#``, except, where no column counts the words, those with a tag in its place.

    Args:
        token_column, tag_column: counted from 1; None goes by the rule above.
        errors: "strict" refuses what is not IOB2; "repair" reads IOB1, IOBES and broken sequences
            as :func:`entity_spans` does, and yields IOB2. "ignore" is for words whose tags do not
            matter and may be missing: whatever is none counts as ``O``.
        name: what messages call the source; None takes the path.

    Raises:
        DataError: naming ``file:line``, for a column that is not there, an empty word, an unknown
            or missing tag, an ``I-X`` that continues nothing, or bytes that are not UTF-8.
        OSError: where the file cannot be opened or read.
    """
    for option, value in (("token_column", token_column), ("tag_column", tag_column)):
        if value is not None and value < 1:
            raise ValueError(f"{option} is counted from 1, got {value}")
    if errors not in ("strict", "repair", "ignore"):
        raise ValueError(f"errors must be 'strict', 'repair' or 'ignore', got {errors!r}")
    if isinstance(source, str | Path):
        with Path(source).open("rb") as stream:
            yield from read_sentences(
                stream,
                token_column=token_column,
                tag_column=tag_column,
                errors=errors,
                name=name or str(source),
            )
        return
    name = name or str(getattr(source, "name", "input"))
    layout: _Layout | None = None
    for block in _blocks(text_lines(source, name)):
        if layout is None:
            layout = _Layout.recognised(
                block, name, token_column, tag_column, tagged=errors != "ignore"
            )
        sentence = None if layout is None else layout.sentence(block, errors)
        if sentence is not None and sentence.words:
            yield sentence


def _blocks(lines: Iterable[str]) -> Iterator[list[tuple[int, str]]]:
    """Runs of lines that are not empty, with their numbers."""
    block: list[tuple[int, str]] = []
    for number, line in enumerate(lines, 1):
        if line.strip(_BLANKS):
            block.append((number, line.rstrip("\r\n")))
        elif block:
            yield block
            block = []
    if block:
        yield block


@dataclass(frozen=True)
class _Layout:
    """How the lines of a file are made; ``token`` and ``tag`` count columns from 0."""

    name: str
    tabs: bool
    width: int
    counted: bool  # the first column numbers the words
    token: int
    tag: int
    line: int  # whence the rest is known

    @classmethod
    def recognised(
        cls,
        block: list[tuple[int, str]],
        name: str,
        token_column: int | None,
        tag_column: int | None,
        *,
        tagged: bool,
    ) -> _Layout | None:
        """From the first sentence; None for a block without one.

        ``tagged``: whether there must be a column of tags.
        """
        rows = [(number, text) for number, text in block if not text.startswith("#")]
        tabs = bool(rows) and "\t" in rows[0][1]
        fields = [(number, _fields(text, tabs)) for number, text in rows]
        fields = [(number, row) for number, row in fields if row[0] != "-DOCSTART-"]
        if not fields:
            return None
        line, width = fields[0][0], len(fields[0][1])
        first_column = [row[0] for _, row in fields]
        counted = (
            tabs and width >= 3 and first_column == [str(n + 1) for n in range(len(first_column))]
        )
        token = (2 if counted else 1) if token_column is None else token_column
        tag = (3 if counted else width) if tag_column is None else tag_column
        for option, column in (("token_column", token), ("tag_column", tag)):
            if column > width:
                raise DataError(
                    f"{name}:{line}: there is no column {column} ({option}): the line has {width} "
                    f"columns, parted by {'tabs' if tabs else 'blanks'}"
                )
        if token == tag and tagged:
            found = "the only one is the word" if width == 1 else "it is the word's column too"
            raise DataError(f"{name}:{line}: no column for the tag: {found}")
        both_given = token_column is not None and tag_column is not None
        return cls(name, tabs, width, counted and not both_given, token - 1, tag - 1, line)

    def sentence(self, block: list[tuple[int, str]], errors: Errors) -> TaggedSentence:
        known = _IOB2 if errors == "strict" else _REPAIRABLE
        if self.tag == self.token:
            known = _ANYTHING
        sentence = TaggedSentence([], [], [])
        for number, text in block:
            fields = _fields(text, self.tabs)
            tag = fields[self.tag].strip() if len(fields) == self.width else ""
            comment = text.startswith("#") and (self.counted or known.fullmatch(tag) is None)
            if comment or fields[0] == "-DOCSTART-":
                continue
            self._check_row(number, fields)
            sentence.words.append(fields[self.token])
            sentence.tags.append(tag)
            sentence.lines.append(number)
        if errors != "ignore":
            _check(sentence.tags, lambda word: f"{self.name}:{sentence.lines[word]}", errors)
        return sentence if errors == "strict" else sentence._replace(tags=to_iob2(sentence.tags))

    def _check_row(self, number: int, fields: list[str]) -> None:
        where = f"{self.name}:{number}"
        if len(fields) != self.width:
            missing = " (is the tag missing?)" if len(fields) < self.width else ""
            raise DataError(
                f"{where}: {len(fields)} columns, expected {self.width} as in line {self.line}"
                f"{missing}"
            )
        if self.counted and not fields[0].isdecimal():
            raise DataError(
                f"{where}: column 1 counts the words in the first sentence (line {self.line}), "
                f"here it is {fields[0][:40]!r}; name the columns by token_column and tag_column"
            )
        if not fields[self.token]:
            raise DataError(f"{where}: the word, column {self.token + 1}, is empty")


def _fields(text: str, tabs: bool) -> list[str]:
    return text.split("\t") if tabs else _SPACES.split(text.strip(_BLANKS))


def _check(tags: Sequence[str], where: Callable[[int], str], errors: Errors = "strict") -> None:
    """DataError for the first tag that is unknown or, where strict, continues nothing."""
    known, scheme = (
        (_IOB2, "O, B-TYPE or I-TYPE")
        if errors == "strict"
        else (_REPAIRABLE, "O, or a TYPE after B-, I-, E- or S-")
    )
    before = "O"
    for word, tag in enumerate(tags):
        if not tag:
            raise DataError(f"{where(word)}: the tag is missing, expected {scheme}")
        if known.fullmatch(tag) is None:
            hint = "; is this the column of the tags?" if "-" not in tag else ""
            raise DataError(f"{where(word)}: unknown tag {tag[:60]!r}, expected {scheme}{hint}")
        if errors == "strict" and tag[0] == "I" and before[1:] != tag[1:]:
            after = f"after {before!r}" if word else "at the beginning of a sentence"
            raise DataError(
                f"{where(word)}: broken tag sequence: {tag!r} {after} continues no entity "
                f"(errors='repair' reads it as the beginning of one, as IOB1 means it)"
            )
        before = tag
