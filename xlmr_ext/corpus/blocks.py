"""Blocks: lines of one language packed into what a model takes at once.

A block is `<s>` line `</s>` line `</s>` ..., consecutive lines of one language, at most
``max_length`` tokens with these: "full sentences" of Liu et al. 2019 (arXiv 1907.11692), section
4.1, on the text streams of Lample & Conneau 2019 (arXiv 1901.07291), section 3.3. A line that does
not fit behind others begins the next block; one that fits no block is cut into several.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from xlmr_ext.corpus.lines import LineReader, Place

if TYPE_CHECKING:
    from xlmr_ext.corpus.files import Corpus
    from xlmr_ext.tokenization import XLMRobertaTokenizer

__all__ = ["Block", "Packer", "blocks_in", "count_blocks"]

# Lines that are tokenized together, the most that a reader is ahead.
AHEAD = 32
# Text of a language that the number of its blocks is estimated on.
_SAMPLE_BYTES = 1 << 18
_LEAST_SAMPLE = 1 << 12


class Block(NamedTuple):
    """Token ids, special tokens included, and where the first of them is from."""

    ids: list[int]
    file: int
    line: int


class _Line(NamedTuple):
    ids: list[int]
    file: int  # its place in the order
    begin: Place
    end: Place


class Packer:
    """The blocks of some files, once, from a place on.

    Args:
        order: numbers of the corpus' files, as they are read.
        state: of :meth:`state`, where another packer stopped.
    """

    def __init__(
        self,
        corpus: Corpus,
        order: Sequence[int],
        tokenizer: XLMRobertaTokenizer,
        max_length: int,
        state: dict[str, Any] | None = None,
    ) -> None:
        self._corpus, self._order, self._tokenizer = corpus, list(order), tokenizer
        self._max_length = max_length
        self._first, self._last = int(tokenizer.bos_token_id), int(tokenizer.eos_token_id)
        self._reader: LineReader | None = None
        self._ahead: deque[_Line] = deque()
        # Behind what is in blocks and in the rest: a file by its number in the order.
        self._file, self.place = 0, Place()
        self._rest: list[int] = []  # of a line that is partly in blocks before
        self._line = 0  # the latest one taken, from 1
        if state is not None:
            self._file, self.place = state["file"], Place(*state["place"])
            self._rest, self._line = list(state["rest"]), state["line"]
        self._following, self._start = self._file, self.place  # what is to be read

    def state(self) -> dict[str, Any]:
        """For JSON: where the next block begins."""
        return {
            "file": self._file,
            "place": list(self.place),
            "rest": self._rest,
            "line": self._line,
        }

    def next(self) -> Block | None:
        """The next block; None at the end."""
        ids, file, first = [self._first], 0, 0
        while True:
            line = self._rest or self._peek()
            if line is None:
                break
            room = self._max_length - len(ids) - 1  # but for the </s> behind it
            if len(ids) > 1 and len(line) > room:
                break
            if not self._rest:
                self._take()
            if len(ids) == 1:
                file, first = self._order[self._file], self._line
            ids += [*line[:room], self._last]
            self._rest = line[room:]
        return Block(ids, file, first) if len(ids) > 1 else None

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _peek(self) -> list[int] | None:
        """The ids of the next line that has any; it is still to be taken."""
        while not self._ahead:
            if not self._read():
                return None
        return self._ahead[0].ids

    def _take(self) -> None:
        line = self._ahead.popleft()
        self._file, self.place, self._line = line.file, line.end, line.begin.line + 1

    def _read(self) -> bool:
        """Reads some lines ahead; False at the end."""
        if self._reader is None:
            if self._following == len(self._order):
                return False
            file = self._corpus.files[self._order[self._following]]
            self._reader = LineReader(file, self._start)
            self._following, self._start = self._following + 1, Place()
        texts: list[str] = []
        places = [self._reader.place]
        while len(texts) < AHEAD and (text := self._reader.next()) is not None:
            texts.append(text)
            places.append(self._reader.place)
        if not texts:
            self.close()
            return True
        # What reads like <mask> in a text is text.
        encoded = self._tokenizer(
            texts, add_special_tokens=False, split_special_tokens=True, verbose=False
        )["input_ids"]
        self._ahead.extend(
            _Line(ids, self._following - 1, begin, end)
            for ids, begin, end in zip(encoded, places, places[1:], strict=False)
            if ids
        )
        return True


def blocks_in(
    corpus: Corpus, tokenizer: XLMRobertaTokenizer, language: str, max_length: int
) -> Iterator[Block]:
    """All blocks of a language, once, in the order of its files."""
    packer = Packer(corpus, corpus.of(language), tokenizer, max_length)
    try:
        while (block := packer.next()) is not None:
            yield block
    finally:
        packer.close()


def count_blocks(
    corpus: Corpus, tokenizer: XLMRobertaTokenizer, language: str, max_length: int
) -> float:
    """About how many blocks a language has, by the first 256 KiB of its files; of a smaller one,
    how many.

    Raises:
        ValueError: no line of it has a token.
    """
    files = corpus.of(language)
    total = sum(corpus.files[n].text_bytes for n in files)
    count = 0.0
    for number in files:
        size = corpus.files[number].text_bytes
        share = max(_LEAST_SAMPLE, _SAMPLE_BYTES * size // total)
        packer = Packer(corpus, [number], tokenizer, max_length)
        found, ended = 0, False
        while not ended and (size <= share or packer.place.offset < share):
            ended = packer.next() is None
            found += not ended
        count += found if ended else found * size / packer.place.offset
        packer.close()
    if not count:
        raise ValueError(f"{corpus.where(files[0])}: its text has no tokens")
    return count
