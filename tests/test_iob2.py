"""Reading words with IOB2 tags, what is refused, and which entities tags mean."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import pytest

from xlmr_ext.data import DataError
from xlmr_ext.tasks.iob2 import (
    TaggedSentences,
    entity_spans,
    read_iob2,
    read_sentences,
    to_iob2,
)

UNER = (
    "# sent_id = 1\n# text = Angela Merkel # 1\n"
    "1\tAngela\tB-PER\t-\tannotator\n2\tMerkel\tI-PER\t-\tannotator\n3\t#\tO\t-\t-\n4\t1\tO\t-\t-\n"
    "\n\n# sent_id = 2\n1\tParis\tB-LOC\t-\t-\n2\tRome\tB-LOC\t-\t-\n3\t 1 000\tO\t-\t-"
)
CONLL = (
    "-DOCSTART- -X- -X- O\n\nEU NNP B-NP B-ORG\n# NN I-NP O\n1 CD I-NP O\n\n"
    "# sent_id = 3 x\nPeter NNP B-NP B-PER\nBlackburn NNP I-NP I-PER\n   \n"
)


def write(folder: Path, text: str | bytes, name: str = "data.iob2") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_universal_ner(tmp_path: Path, end: str) -> None:
    data = read_iob2(write(tmp_path, UNER.replace("\n", end)))
    assert data.words == [["Angela", "Merkel", "#", "1"], ["Paris", "Rome", " 1 000"]]
    assert data.tags == [["B-PER", "I-PER", "O", "O"], ["B-LOC", "B-LOC", "O"]]
    assert data.lines == [[3, 4, 5, 6], [10, 11, 12]]
    assert data.where(1, 2) == f"{tmp_path / 'data.iob2'}:12"
    assert len(data) == 2


@pytest.mark.parametrize("separator", [" ", "   ", "\t"])
def test_conll_2003(tmp_path: Path, separator: str) -> None:
    data = read_iob2(write(tmp_path, CONLL.replace(" ", separator)))
    assert data.words == [["EU", "#", "1"], ["Peter", "Blackburn"]]
    assert data.tags == [["B-ORG", "O", "O"], ["B-PER", "I-PER"]]


def test_columns_by_number(tmp_path: Path) -> None:
    lines = "B-LOC\tx\tRome\n# a comment\nO\tx\t#\n"
    data = read_iob2(write(tmp_path, lines), token_column=3, tag_column=1)
    assert (data.words, data.tags) == ([["Rome", "#"]], [["B-LOC", "O"]])
    # A file whose first sentence happens to count its words.
    lines = "1\tx\tO\n\nRome\tx\tB-LOC\n"
    with pytest.raises(DataError, match=r"data\.iob2:3: column 1 counts the words in the first"):
        read_iob2(write(tmp_path, lines))
    data = read_iob2(write(tmp_path, lines), token_column=1, tag_column=3)
    assert data.words == [["1"], ["Rome"]]


def test_white_space_that_is_no_separator(tmp_path: Path) -> None:
    # No-break space, ideographic space, line separator, next line: parts of words.
    words = ["a\u00a0b", "\u3000", "c\u2028d", "e\x85f"]
    data = read_iob2(write(tmp_path, "".join(f"{word} O\n" for word in words)))
    assert data.words == [words]


def test_a_byte_order_mark_is_no_part_of_the_word(tmp_path: Path) -> None:
    assert read_iob2(write(tmp_path, b"\xef\xbb\xbfRome B-LOC\n")).words == [["Rome"]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a O\nb I-PER\n", "2: broken tag sequence: 'I-PER' after 'O'"),
        ("a B-LOC\nb I-PER\n", "2: broken tag sequence: 'I-PER' after 'B-LOC'"),
        ("a B-LOC\n\nb I-LOC\n", "3: broken tag sequence: 'I-LOC' at the beginning"),
        ("a B-LOC\nb E-LOC\n", "2: unknown tag 'E-LOC', expected O, B-TYPE or I-TYPE"),
        ("a O\nb NNP\n", "2: unknown tag 'NNP'.*is this the column"),
        ("a B-\n", "1: unknown tag 'B-'"),
        ("a O\nb\n", r"2: 1 columns, expected 2 as in line 1 \(is the tag missing\?\)"),
        ("a O\nb c O\n", "2: 3 columns, expected 2 as in line 1"),
        ("a\tO\nb\t\n", "2: the tag is missing"),
        ("a\tO\n\tO\n", "2: the word, column 1, is empty"),
        ("a\nb\n", "1: no column for the tag: the only one is the word"),
        ("1\ta\tO\t-\n\nx\tb\tO\t-\n", "3: column 1 counts the words .* here it is 'x'"),
        (b"a O\n\xff O\n", "2: not UTF-8"),
        ("", " has no sentences"),
        ("# only a comment\n\n-DOCSTART- O\n", " has no sentences"),
    ],
)
def test_refused_with_file_and_line(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=rf"data\.iob2:?{message}"):
        read_iob2(write(tmp_path, text))


def test_refused_options(tmp_path: Path) -> None:
    path = write(tmp_path, "a b O\n")
    with pytest.raises(DataError, match=r":1: there is no column 4 \(tag_column\).* 3 columns"):
        read_iob2(path, tag_column=4)
    with pytest.raises(DataError, match=":1: no column for the tag: it is the word's"):
        read_iob2(path, token_column=3)
    with pytest.raises(ValueError, match="tag_column is counted from 1, got 0"):
        read_iob2(path, tag_column=0)
    with pytest.raises(ValueError, match="errors must be"):
        read_iob2(path, errors="lenient")  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError):
        read_iob2(tmp_path / "absent")


def test_repair_reads_iob1_and_iobes(tmp_path: Path) -> None:
    iob1 = "a I-PER\nb I-PER\nc B-PER\nd O\ne I-LOC\nf I-ORG\n"
    data = read_iob2(write(tmp_path, iob1), errors="repair")
    assert data.tags == [["B-PER", "I-PER", "B-PER", "O", "B-LOC", "B-ORG"]]
    iobes = "a S-PER\nb B-LOC\nc I-LOC\nd E-LOC\ne S-LOC\nf O\n"
    data = read_iob2(write(tmp_path, iobes), errors="repair")
    assert data.tags == [["B-PER", "B-LOC", "I-LOC", "I-LOC", "B-LOC", "O"]]
    with pytest.raises(DataError, match=":1: unknown tag 'X-PER'"):
        read_iob2(write(tmp_path, "a X-PER\n"), errors="repair")


def test_sentences_are_streamed() -> None:
    taken = 0

    class Source(io.BytesIO):
        def __next__(self) -> bytes:
            nonlocal taken
            taken += 1
            return super().__next__()

    sentences = read_sentences(Source(b"a O\nb O\n\n" * 100), name="stdin")
    assert next(sentences).words == ["a", "b"]
    assert taken == 3
    assert next(sentences).lines == [4, 5]


def test_sentences_made_in_code() -> None:
    data = TaggedSentences.of([(["Rome", "."], ["B-LOC", "O"]), ([], [])])
    assert data.words == [["Rome", "."], []]
    assert data.where(0, 1) == "data[0][1]"
    with pytest.raises(ValueError, match=r"data\[0\]: 2 words but 1 tags"):
        TaggedSentences.of([(["a", "b"], ["O"])])
    with pytest.raises(ValueError, match=r"mine\[0\]\[1\]: broken tag sequence: 'I-LOC' after 'O'"):
        TaggedSentences.of([(["a", "b"], ["O", "I-LOC"])], "mine")
    with pytest.raises(TypeError, match=r"data\[0\]: the words must be a list of str"):
        TaggedSentences.of([("ab", ["O", "O"])])
    with pytest.raises(ValueError, match="tags of data must be one a word"):
        TaggedSentences([["a"]], [["O", "O"]])


def by_definition(tags: tuple[str, ...]) -> list[tuple[str, int, int]]:
    """Every (type, first, end) tried: its first tag begins, the others continue, the next not."""
    spans = []
    for first, end in itertools.combinations(range(len(tags) + 1), 2):
        kind = tags[first][2:]
        begins = tags[first][0] == "B" or (
            tags[first][0] == "I" and (first == 0 or tags[first - 1][2:] != kind)
        )
        inside = all(tag == f"I-{kind}" for tag in tags[first + 1 : end])
        closed = end == len(tags) or tags[end] != f"I-{kind}"
        if begins and inside and closed:
            spans.append((kind, first, end))
    return spans


@pytest.mark.parametrize("length", range(6))
def test_entities_are_those_of_the_definition(length: int) -> None:
    for tags in itertools.product(("O", "B-PER", "I-PER", "B-LOC", "I-LOC"), repeat=length):
        spans = entity_spans(tags)
        assert spans == by_definition(tags)
        fixed = to_iob2(tags)
        assert entity_spans(fixed) == spans
        TaggedSentences.of([(fixed, fixed)])


def test_entities_of_other_schemes() -> None:
    # What seqeval.metrics.sequence_labeling.get_entities answers.
    assert entity_spans(["E-A", "I-A", "S-A", "I-A", "B-A", "E-A", "E-A"]) == [
        ("A", 0, 1), ("A", 1, 2), ("A", 2, 3), ("A", 3, 4), ("A", 4, 6), ("A", 6, 7),
    ]  # fmt: skip
    assert entity_spans(["B-X-Y", "I-X-Y", "I-X"]) == [("X-Y", 0, 2), ("X", 2, 3)]


@pytest.mark.parametrize(
    ("name", "sentences", "words", "entities"),
    [
        ("uner_en_ewt/en_ewt-ud-dev.iob2", 2001, 25149, 966),
        ("uner_en_ewt/en_ewt-ud-test.iob2", 2077, 25097, 1088),
        ("uner_de_pud/de_pud-ud-test.iob2", 1000, 21331, 1039),
    ],
)
def test_published_files(
    data_dir: Path, name: str, sentences: int, words: int, entities: int
) -> None:
    path = data_dir / "ner" / name
    data = read_iob2(path)
    lines = path.read_text(encoding="utf-8").split("\n")
    assert len(data) == sum(line.startswith("# sent_id") for line in lines) == sentences
    assert sum(map(len, data.words)) == words
    # IOB2: as many entities as B- tags.
    begins = sum(line.split("\t")[2].startswith("B-") for line in lines if "\t" in line[:4])
    assert sum(len(entity_spans(tags)) for tags in data.tags) == begins == entities


def test_words_whose_tags_do_not_matter(tmp_path: Path) -> None:
    """Without a column of tags, with other things in it, with comments and a hash as a word."""
    for content in (
        "# text = a b c\na\nb\n#\n\nc\n",
        "a I-PER\nb NN\n# E-LOC\n\nc -\n",
        "1\ta\t_\n2\tb\tB-PER\n3\t#\tX\n\n# comment\n1\tc\t\n",
    ):
        found = read_iob2(write(tmp_path, content), errors="ignore")
        assert found.words == [["a", "b", "#"], ["c"]]
        assert [len(tags) for tags in found.tags] == [3, 1]
    with pytest.raises(DataError, match=":1: no column for the tag: the only one is the word"):
        read_iob2(write(tmp_path, "a\nb\n"))
    with pytest.raises(DataError, match=":2: 2 columns, expected 1 as in line 1"):
        read_iob2(write(tmp_path, "a\nb c\n"), errors="ignore")
