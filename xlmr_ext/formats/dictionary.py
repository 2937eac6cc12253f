"""fairseq's ``dict.txt``: the words of an embedding, in the order of its rows.

Its ids are ``<s>`` 0, ``<pad>`` 1, ``</s>`` 2, ``<unk>`` 3, then the file's lines, ``word count``
each, and ``<mask>`` last, which the masked language model's tasks add.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

__all__ = ["MASK", "PAD", "UNK", "dictionary_text", "read_dictionary", "rows_of_words"]

_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
PAD = 1
UNK = 3
MASK = "<mask>"
_OVERWRITE = "#fairseq:overwrite"
# What fairseq appends to make the number of words a multiple of 8; no text contains it.
_FILLING = "madeupword"
_MAX_BYTES = 2**28  # XLM-R's has 5 MB


def read_dictionary(path: Path) -> list[str]:
    """The word of every id, ``<mask>`` included; line n of the file is id n + 3.

    A word that a later line overwrites keeps its place under an empty name, which no piece has.

    Raises:
        OSError: the file cannot be read.
        ValueError: not a dictionary; the message names the file and the line.
    """
    size = path.stat().st_size
    if size > _MAX_BYTES:
        raise ValueError(f"{path}: {size} bytes are too many for a dictionary")
    data = path.read_bytes()
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        place = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {place}: not UTF-8 ({error.reason})") from None
    words = list(_SPECIAL)
    ids = {word: index for index, word in enumerate(words)}
    for number, line in enumerate(io.StringIO(text, newline=None), 1):
        word, _, count = line.rstrip().rpartition(" ")
        overwrite = count == _OVERWRITE
        if overwrite:
            word, _, count = word.rpartition(" ")
        if not word or not count.lstrip("-").isdecimal():
            raise ValueError(f"{path}, line {number}: expected 'word count', got {line[:80]!r}")
        if word in ids:
            if not overwrite:
                raise ValueError(
                    f"{path}, line {number}: {word!r} is there already, as id {ids[word]}"
                )
            words[ids[word]] = ""
        ids[word] = len(words)
        words.append(word)
    if MASK not in ids:
        words.append(MASK)
    return words


def rows_of_words(path: Path, words: Sequence[str], pieces: Sequence[str]) -> list[int]:
    """The dictionary's id of every token of a sentencepiece vocabulary, in XLM-R's numbering.

    fairseq reads a piece that the dictionary lacks as ``<unk>``; so it gets that row.

    Args:
        path: of ``dict.txt``, for messages.
        words: of :func:`read_dictionary`.
        pieces: the token of every id of XLM-R's tokenizer.

    Raises:
        ValueError: a line is no piece of this vocabulary: the two files do not belong together.
    """
    known = set(pieces)
    for index, word in enumerate(words):
        if word and word not in known and not word.startswith(_FILLING):
            raise ValueError(
                f"{path}, line {index - len(_SPECIAL) + 1}: {word!r} is no piece of the "
                "sentencepiece model beside it; the two do not belong together"
            )
    ids = {word: index for index, word in enumerate(words)}
    return [ids.get(piece, UNK) for piece in pieces]


def dictionary_text(pieces: Sequence[str]) -> str:
    """The content of ``dict.txt`` for XLM-R's tokens, ``<s>`` to ``<mask>``.

    The counts are all 1: nothing of a trained model depends on them.

    Raises:
        ValueError: the vocabulary holds what no line can express.
    """
    words = pieces[len(_SPECIAL) : -1]
    for word in words:
        if not word or word in _SPECIAL or "\n" in word or "\r" in word:
            raise ValueError(f"the piece {word!r} cannot stand in a dict.txt")
    return "".join(f"{word} 1\n" for word in words)
