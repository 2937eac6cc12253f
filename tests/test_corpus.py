"""Text files as blocks of languages: files, lines, packing, sampling, places to go on from."""

from __future__ import annotations

import gzip
import json
import math
import os
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from xlmr_vocabulary import write_tiny_vocabulary

from xlmr_ext import XLMRobertaTokenizer
from xlmr_ext.corpus import blocks as blocks_module
from xlmr_ext.corpus import files as files_module
from xlmr_ext.corpus import lines as lines_module
from xlmr_ext.corpus.blocks import AHEAD, Block, Packer, blocks_in, count_blocks
from xlmr_ext.corpus.files import Corpus, are_rows, scan_corpus, text_files
from xlmr_ext.corpus.lines import LineReader, Place
from xlmr_ext.corpus.mixture import Mixture, sampling_shares
from xlmr_ext.data import DataError

LENGTH = 24


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> XLMRobertaTokenizer:
    return XLMRobertaTokenizer(write_tiny_vocabulary(tmp_path_factory.mktemp("vocabulary")))


def write(path: Path, lines: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(f"{line}\n" for line in lines).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def some_lines(count: int, seed: int = 0) -> list[str]:
    source = random.Random(seed)
    words = ["Das", "Buch", "the", "quick", "fox", "чай", "公园", "ذهبنا", "chat", "petit"]
    return [" ".join(source.choices(words, k=source.randint(1, 9))) for _ in range(count)]


def corpus_of(**files: Path | list[Path]) -> Corpus:
    return scan_corpus(text_files(files, "train"))  # type: ignore[arg-type]


# --- Which files ----------------------------------------------------------------------------------


def test_files_by_language(tmp_path: Path) -> None:
    for name in ("de.txt", "en/b.txt", "en/a.txt.gz", "en/deep/c.txt", "en/notes.md"):
        write(tmp_path / name, ["ein Satz"])

    def found(given: Any) -> dict[str, list[str]]:
        files = text_files(given, "train")
        return {k: [p.relative_to(tmp_path).as_posix() for p in v] for k, v in files.items()}

    english = ["en/a.txt.gz", "en/b.txt", "en/deep/c.txt"]
    assert found({"en": tmp_path / "en", "de": [tmp_path / "de.txt"]}) == {
        "de": ["de.txt"],
        "en": english,
    }
    assert found(str(tmp_path / "de.txt")) == {"de": ["de.txt"]}
    assert found([tmp_path / "en", tmp_path / "de.txt"]) == {
        "a": ["en/a.txt.gz"],
        "b": ["en/b.txt"],
        "c": ["en/deep/c.txt"],
        "de": ["de.txt"],
    }
    assert found({"en": f"{tmp_path}/en/*.txt"}) == {"en": ["en/b.txt"]}
    assert found({"en": f"{tmp_path}/**/*.txt*"})["en"] == ["de.txt", *english]
    # A file that is given twice is one.
    assert found({"en": [tmp_path / "en/b.txt", f"{tmp_path}/en/b*"]}) == {"en": ["en/b.txt"]}


def test_files_that_cannot_be(tmp_path: Path) -> None:
    path = write(tmp_path / "de.txt", ["ein Satz"])
    (tmp_path / "none").mkdir()
    for given_, message in (
        ({}, "train has no files"),
        ([], "train has no files"),
        (tmp_path / "none", r"train: .*none has no file that ends in .txt or .txt.gz"),
        (str(tmp_path / "x*.txt"), r"train: no file is like .*x\*.txt"),
        ({"": path}, "train has a language called ''; expected a name"),
        ({"de": path, "nl": path}, "train has .*de.txt as de and as nl"),
    ):
        with pytest.raises(ValueError, match=message):
            text_files(given_, "train")  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match=r"absent\.txt"):
        text_files(tmp_path / "absent.txt", "train")


def test_a_scan_reads_every_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = some_lines(50)
    plain, packed = write(tmp_path / "a.txt", lines), write(tmp_path / "b.txt.gz", lines)
    (tmp_path / "c.txt").write_bytes("\n".join(lines).encode())  # the last line has no end
    files = {"x": [plain, packed, tmp_path / "c.txt"]}
    told: list[str] = []
    real = files_module._scanned

    def noted(language: str, path: Path, *more: Any) -> Any:
        told.append(str(path))
        return real(language, path, *more)

    monkeypatch.setattr(files_module, "_scanned", noted)
    corpus = scan_corpus(files)
    assert len(told) == 3
    assert [file.is_gzip for file in corpus.files] == [False, True, False]
    assert [file.lines for file in corpus.files] == [50, 50, 50]
    # The same text is the same, however it lies on the disk.
    assert corpus.digests()[0] == corpus.digests()[1] != corpus.digests()[2]
    assert scan_corpus({"y": [plain]}).digests()[0] != corpus.digests()[0]
    # Known files are not read, changed ones are.
    rows = json.loads(json.dumps(corpus.rows()))
    assert are_rows(rows)
    assert not are_rows([{}])
    write(packed, [*lines, "more"])
    told.clear()
    again = scan_corpus(files, rows)
    assert told == [str(packed)]
    assert (again.digests() == corpus.digests()).tolist() == [True, False, True]


def test_text_that_is_none_is_named(tmp_path: Path) -> None:
    bad = {
        "bytes.txt": (b"ein Satz\n\nDas \xff Buch\n", r"bytes.txt:3: not UTF-8 \(byte 0xff"),
        "cut.txt": (b"ein Satz\nDas \xc3", r"cut.txt:2: not UTF-8 \(byte 0xc3"),
        "wide.txt": ("Satz\n".encode("utf-16"), "wide.txt:1: not UTF-8 .* it looks like UTF-16"),
        "empty.txt": (b"", "empty.txt: has no text"),
        "blank.txt": (b"\n \n\t\r\n", "blank.txt: has no text"),
        "table.csv": (b"text\nSatz\n", "table.csv: expected plain text, .* and this is csv"),
        "plain.gz": (b"Satz\n", "plain.gz: not a gzip, as its name says"),
        "cut.gz": (gzip.compress(b"Satz\n" * 99)[:-9], "cut.gz: damaged gzip: "),
        "packed.gz": (gzip.compress(b"a\n\xfe\n"), r"packed.gz:2: not UTF-8"),
    }
    good = write(tmp_path / "good.txt", ["ein Satz"])
    for name, (content, message) in bad.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message):
            corpus_of(de=[good, tmp_path / name])


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match=r"pipe: expected a file, .*, not a pipe"):
        corpus_of(de=tmp_path / "pipe")


def test_bad_bytes_beyond_the_first_chunk(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"ein Satz\n" * 200_000 + b"\x80\n")
    with pytest.raises(DataError, match=r"a.txt:200001: not UTF-8 \(byte 0x80"):
        corpus_of(de=tmp_path / "a.txt")


# --- Lines ----------------------------------------------------------------------------------------


def read(corpus: Corpus, place: Place = Place()) -> list[tuple[str, Place]]:  # noqa: B008
    reader = LineReader(corpus.files[0], place)
    found = []
    try:
        while (text := reader.next()) is not None:
            found.append((text, reader.place))
    finally:
        reader.close()
    return found


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_reading_goes_on_from_every_place(tmp_path: Path, name: str) -> None:
    lines = ["\ufeffeins", "", "zwei\u2028drei", "четыре ", "五\x85六", "\ufeffsieben"]
    content = "\r\n".join(lines).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    corpus = corpus_of(x=tmp_path / name)
    whole = read(corpus)
    assert [text for text, _ in whole] == ["eins", *lines[1:]]
    assert [place.line for _, place in whole] == [1, 2, 3, 4, 5, 5]
    assert whole[-1][1].offset == len(content)
    for index, (_, place) in enumerate(whole):
        assert read(corpus, place) == whole[index + 1 :]


@pytest.mark.parametrize("space", [" ", ""])
def test_a_long_line_comes_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, space: str
) -> None:
    monkeypatch.setattr(lines_module, "MOST_BYTES", 64)
    long = space.join(["чай", "公园", "fox"] * 40)
    corpus = corpus_of(x=write(tmp_path / "a.txt", ["Satz", long, "Ende"]))
    found = read(corpus)
    assert "".join(text for text, _ in found) == f"Satz{long}Ende"
    assert all(len(text.encode()) <= 64 for text, _ in found)
    assert len(found) > 10
    assert {place.line for _, place in found} == {1, 2, 3}
    if space:  # at a space
        assert all(text.endswith(" ") for text, _ in found[1:-2])
    for index, (_, place) in enumerate(found):
        assert read(corpus, place) == found[index + 1 :]


def test_a_file_that_changes_under_a_run(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", ["Satz", "Buch"])
    corpus = corpus_of(x=path)
    path.write_bytes(b"Satz\n\xff\n")
    with pytest.raises(DataError, match=r"a.txt:2: not UTF-8 .*, and it was when the run began"):
        read(corpus)


# --- Blocks ---------------------------------------------------------------------------------------


def packed_plainly(tokenizer: Any, lines: list[str], length: int) -> list[list[int]]:
    """The rule of blocks.py in the plainest words."""
    found: list[list[int]] = []
    block: list[int] = []
    for line in lines:
        ids = tokenizer.convert_tokens_to_ids(tokenizer.tokenize(line))
        if block and ids and len(block) + len(ids) + 1 > length:
            found.append(block)
            block = []
        while ids:
            if not block:
                block = [tokenizer.bos_token_id]
            room = length - len(block) - 1
            block = [*block, *ids[:room], tokenizer.eos_token_id]
            ids = ids[room:]
            if ids:
                found.append(block)
                block = []
    return [*found, block] if block else found


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text("a bc公\n\tчx", max_size=60), min_size=1, max_size=12),
    st.integers(3, 30),
)
def test_blocks_are_full_sentences(
    tokenizer: XLMRobertaTokenizer, tmp_path_factory: Any, texts: list[str], length: int
) -> None:
    path = tmp_path_factory.mktemp("corpus") / "a.txt"
    lines = "\n".join([*texts, "Buch"]).split("\n")
    corpus = corpus_of(x=write(path, lines))
    found = list(blocks_in(corpus, tokenizer, "x", length))
    assert [block.ids for block in found] == packed_plainly(tokenizer, lines, length)
    assert all(3 <= len(block.ids) <= length for block in found)
    assert count_blocks(corpus, tokenizer, "x", length) == len(found)


def test_a_block_says_where_it_is_from(tmp_path: Path, tokenizer: XLMRobertaTokenizer) -> None:
    first = write(tmp_path / "a.txt", ["", "Buch " * 40, "fox", "fox"])
    second = write(tmp_path / "b.txt.gz", ["чай"] * 100)
    corpus = corpus_of(x=[first, second])
    found = list(blocks_in(corpus, tokenizer, "x", LENGTH))
    assert found[0][1:] == (0, 2)
    assert found[1][1:] == (0, 2)  # the rest of the long line
    texts = [tokenizer.decode(block.ids, skip_special_tokens=True) for block in found]
    numbers = [block.line for block in found if block.file == 1]
    assert numbers == sorted(set(numbers))
    assert any("fox" in text and "чай" in text for text in texts)  # a block may cross files


def test_what_reads_like_a_special_token_is_text(
    tmp_path: Path, tokenizer: XLMRobertaTokenizer
) -> None:
    corpus = corpus_of(x=write(tmp_path / "a.txt", ["Buch <mask> Buch </s> <pad>"]))
    (block,) = blocks_in(corpus, tokenizer, "x", 60)
    assert tokenizer.mask_token_id not in block.ids
    assert tokenizer.pad_token_id not in block.ids
    assert block.ids.count(tokenizer.eos_token_id) == 1


def test_packing_goes_on_from_every_block(tmp_path: Path, tokenizer: XLMRobertaTokenizer) -> None:
    lines = some_lines(90)
    lines[7] = "Das Buch " * 50
    files = [write(tmp_path / f"{n}.txt{'.gz' * (n == 1)}", lines[n::3]) for n in range(3)]
    corpus = corpus_of(x=files)

    def rest(packer: Packer) -> list[Block]:
        found = []
        while (block := packer.next()) is not None:
            found.append(block)
        packer.close()
        return found

    order = [2, 0, 1]
    packer = Packer(corpus, order, tokenizer, LENGTH)
    whole, states = [], [packer.state()]
    while (block := packer.next()) is not None:
        whole.append(block)
        states.append(json.loads(json.dumps(packer.state())))
    for index, state in enumerate(states):
        assert rest(Packer(corpus, order, tokenizer, LENGTH, state)) == whole[index:]


def test_the_number_of_blocks_of_a_large_file(
    tmp_path: Path, tokenizer: XLMRobertaTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks_module, "_SAMPLE_BYTES", 1 << 14)
    files = [write(tmp_path / "a.txt", some_lines(3000)), write(tmp_path / "b.txt", some_lines(9))]
    corpus = corpus_of(x=files)
    exact = len(list(blocks_in(corpus, tokenizer, "x", LENGTH)))
    assert count_blocks(corpus, tokenizer, "x", LENGTH) == pytest.approx(exact, rel=0.05)


def test_text_without_tokens(tmp_path: Path, tokenizer: XLMRobertaTokenizer, mixture: Make) -> None:
    corpus = corpus_of(x=write(tmp_path / "a.txt", ["\u3000", "\u00a0"]))
    with pytest.raises(ValueError, match=r"a.txt: its text has no tokens"):
        count_blocks(corpus, tokenizer, "x", LENGTH)
    with pytest.raises(ValueError, match=r"a.txt: its text has no tokens"):
        mixture(corpus, sizes={"x": 1.0}).draw(1)


# --- The mixture ----------------------------------------------------------------------------------


Make = Callable[..., Mixture]


@pytest.fixture
def mixture(tokenizer: XLMRobertaTokenizer) -> Iterator[Make]:
    """Makes mixtures, whose files are closed at the end."""
    with ExitStack() as stack:

        def make(corpus: Corpus, **more: Any) -> Mixture:
            options = {"max_length": LENGTH, "alpha": 0.3, "shuffle": 5, "seed": 3, **more}
            sizes = options.pop("sizes", None) or {
                language: count_blocks(corpus, tokenizer, language, LENGTH)
                for language in corpus.languages
            }
            made = Mixture(corpus, sizes, tokenizer, **options)
            stack.callback(made.close)
            return made

        yield make


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Languages of 300, 40 and 8 lines, the first in three files."""
    folder = tmp_path_factory.mktemp("three")
    lines = some_lines(300)
    files = [write(folder / f"a{n}.txt{'.gz' * (n == 1)}", lines[n::3]) for n in range(3)]
    return corpus_of(
        a=files,
        b=write(folder / "b.txt", some_lines(40, 1)),
        c=write(folder / "c.txt", some_lines(8, 2)),
    )


def test_shares_are_the_papers() -> None:
    """Against the formula, and against Lample & Conneau's, whose p are shares themselves."""
    sizes = {"en": 55_608.0, "sw": 275.0, "ur": 730.0}
    for alpha in (0.0, 0.3, 0.7, 1.0):
        shares = sampling_shares(sizes, alpha)
        p = [size / sum(sizes.values()) for size in sizes.values()]
        q = [value**alpha / sum(other**alpha for other in p) for value in p]
        assert [*shares.values()] == pytest.approx(q, rel=1e-12)
    assert sampling_shares(sizes, 0.0) == pytest.approx(dict.fromkeys(sizes, 1 / 3))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_languages_are_drawn_by_their_shares(
    three: Corpus, tokenizer: XLMRobertaTokenizer, alpha: float, mixture: Make
) -> None:
    """Chi-square of 6000 draws with two degrees of freedom, whose tail is exp(-x / 2)."""
    source = mixture(three, alpha=alpha)
    counts = dict.fromkeys(three.languages, 0)
    for language, block in source.draw(6000):
        counts[language] += 1
        assert three.files[block.file].language == language
    expected = {name: 6000 * share for name, share in source.shares.items()}
    chi = sum((counts[name] - value) ** 2 / value for name, value in expected.items())
    assert math.exp(-chi / 2) > 1e-3
    # The test would see another exponent.
    other = sampling_shares(
        {n: count_blocks(three, tokenizer, n, LENGTH) for n in counts}, alpha + 0.1
    )
    wrong = sum((counts[name] - 6000 * s) ** 2 / (6000 * s) for name, s in other.items())
    assert math.exp(-wrong / 2) < 1e-6


def test_every_pass_has_every_block_once(
    three: Corpus, tokenizer: XLMRobertaTokenizer, mixture: Make
) -> None:
    source = mixture(three, sizes={"b": 1.0})
    size = int(count_blocks(three, tokenizer, "b", LENGTH))
    passes = [[block for _, block in source.draw(size)] for _ in range(3)]
    expected = list(blocks_in(three, tokenizer, "b", LENGTH))
    assert size > 5
    for found in passes:
        assert sorted(found) == sorted(expected)
        assert found != expected  # another order
    assert passes[0] != passes[1] != passes[2]
    in_order = mixture(three, sizes={"b": 1.0}, shuffle=1)
    assert [block for _, block in in_order.draw(size)] == expected


def test_a_seed_decides_everything(three: Corpus, mixture: Make) -> None:
    np.random.seed(0)
    first = mixture(three).draw(200)
    np.random.seed(1)
    torch.manual_seed(5)
    assert mixture(three).draw(200) == first
    assert mixture(three, seed=4).draw(200) != first


def test_a_mixture_goes_on_from_anywhere(three: Corpus, mixture: Make) -> None:
    source = mixture(three)
    draws = []
    states = []
    for _ in range(40):
        facts, tensors = source.state()
        states.append((json.loads(json.dumps(facts)), tensors))
        draws.append(source.draw(7))
    for index in (0, 1, 2, 11, 25, 39):
        again = mixture(three)
        again.draw(3)
        facts, tensors = states[index]
        again.restore(facts, dict(tensors))
        assert [again.draw(7) for _ in draws[index:]] == draws[index:]


def test_going_on_reads_no_file_from_its_start(
    tmp_path: Path, tokenizer: XLMRobertaTokenizer, monkeypatch: pytest.MonkeyPatch, mixture: Make
) -> None:
    corpus = corpus_of(x=write(tmp_path / "a.txt", some_lines(2000)))
    source = mixture(corpus, sizes={"x": 1.0})
    source.draw(300)
    facts, tensors = source.state()
    offset = facts["streams"]["x"]["packer"]["place"][0]
    expected = source.draw(5)
    assert offset > 5000
    # What lies before the place is no text any more.
    content = (tmp_path / "a.txt").read_bytes()
    (tmp_path / "a.txt").write_bytes(b"\xff" * offset + content[offset:])
    again = mixture(corpus, sizes={"x": 1.0})
    again.restore(facts, tensors)
    assert again.draw(5) == expected


def test_memory_is_constant(
    tmp_path: Path, tokenizer: XLMRobertaTokenizer, monkeypatch: pytest.MonkeyPatch, mixture: Make
) -> None:
    """Lines that are read and in no block yet, at any moment, on files of 10 and of 100 times the
    shuffled blocks."""
    word = tokenizer.convert_tokens_to_ids(tokenizer.tokenize("Buch"))
    lines_read = [0]
    plain = LineReader.next

    def counted(self: LineReader) -> str | None:
        text = plain(self)
        lines_read[0] += text is not None
        return text

    monkeypatch.setattr(LineReader, "next", counted)
    most = {}
    for times in (10, 100):
        lines = ["Buch"] * (times * 5 * 8)
        corpus = corpus_of(x=write(tmp_path / f"{times}.txt", lines))
        source = mixture(corpus, sizes={"x": 1.0})
        lines_read[0] = drawn = most[times] = 0
        for _ in range(times * 5 - 6):
            ((_, block),) = source.draw(1)
            drawn += block.ids.count(tokenizer.eos_token_id)
            most[times] = max(most[times], lines_read[0] - drawn)
    in_a_block = (LENGTH - 1) // (len(word) + 1)
    assert most[10] <= 5 * in_a_block + AHEAD + 1
    assert most[100] <= 5 * in_a_block + AHEAD + 1
