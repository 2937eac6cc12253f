"""Memory does not grow with the number of texts, and little with the length of one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from xlmr_ext.tokenization import XLMRobertaTokenizer

pytest_plugins = ["tokenizer_fixtures"]

_STREAM = """
import random, sys
from xlmr_ext.tokenization import XLMRobertaTokenizer

def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))

letters = sys.argv[2]
def texts(count):
    source = random.Random(1)
    for _ in range(count):
        yield "".join(source.choices(letters, k=60))

tokenizer = XLMRobertaTokenizer(sys.argv[1])
tokens = 0
for number, row in enumerate(tokenizer.encode_stream(texts(120_000), num_threads=1)):
    tokens += len(row)
    if number == 20_000:
        before = peak()
print(before, peak(), tokens)
"""


@pytest.mark.parametrize(
    "letters", ["abcdefghi klm ", "今天气很好我们去公园散步"], ids=["words", "no spaces"]
)
def test_a_stream_of_texts_takes_constant_memory(tiny_folder: Path, letters: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", _STREAM, str(tiny_folder / "sentencepiece.bpe.model"), letters],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    before, after, tokens = map(int, run.stdout.split())
    assert tokens > 2_000_000
    # 100,000 texts between the two; their tokens alone would be 16 MB and more.
    assert after - before < 8_000, f"{before} kB after 20,000 texts, {after} after 120,000"


def test_a_stream_is_read_as_it_is_asked_for(tokenizer: XLMRobertaTokenizer) -> None:
    taken = 0

    def endless() -> Iterator[str]:
        nonlocal taken
        while True:
            taken += 1
            yield f"text {taken}"

    rows = tokenizer.encode_stream(endless(), max_length=4)
    first = [next(rows).tolist() for _ in range(3)]
    assert first == [tokenizer.encode(f"text {n}", max_length=4) for n in (1, 2, 3)]
    assert taken < 10_000
    assert list(tokenizer.encode_stream([])) == []
    for bad, match in (
        ("text", "an iterable of str, got a str"),
        ([1], r"text\[0\]: expected a str"),
    ):
        with pytest.raises(TypeError, match=match):
            list(tokenizer.encode_stream(bad))


def test_windows_leave_no_trace(tokenizer: XLMRobertaTokenizer) -> None:
    texts = [f"fox {n} <mask>" if n % 7 else "" for n in range(9000)]
    rows = tokenizer.encode_batch(texts, max_length=6)
    assert [row.tolist() for row in rows] == tokenizer(texts, truncation=True, max_length=6)[
        "input_ids"
    ]
    pairs = tokenizer.encode_batch(texts, texts[::-1], max_length=9)
    assert len(pairs) == 9000
    for n in (0, 4095, 4096, 8999):
        assert pairs[n].tolist() == tokenizer.encode(texts[n], texts[-1 - n], max_length=9)


@pytest.mark.parametrize(
    "text",
    ["fox " * 250_000, "a" * 1_000_000, "字" * 1_000_000, " " * 1_000_000, "<" * 1_000_000,
     "<mask" * 200_000, " \n" * 500_000 + "x", "<mask> " * 142_857, "\ud800" * 1_000_000,
     "e\u0301" * 500_000],
    ids=["words", "letter", "script", "spaces", "brackets", "half", "blank", "masks", "lone",
         "accents"],
)  # fmt: skip
def test_a_million_characters(folder: Path, text: str) -> None:
    tokenizer = XLMRobertaTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["normalized token"])
    batch = tokenizer(text, truncation=True, return_offsets_mapping=True, return_tensors="np")
    assert batch.input_ids.shape[1] <= 512
    assert batch.input_ids[0, -1] == 2
    spans = batch["offset_mapping"][0, 1:-1]
    assert (np.diff(spans, axis=0) >= 0).all()
    assert (spans <= len(text)).all()
