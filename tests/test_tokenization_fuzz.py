"""The tokenizer's fuzz driver: its corpus of past failures, and some cases of its own."""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent / "fuzz"))
import fuzz_tokenizer

CASES = sorted(fuzz_tokenizer.CORPUS.glob("*.json"))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return fuzz_tokenizer.Tokenizers(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_past_failures(tokenizers: Any, path: Path) -> None:
    fuzz_tokenizer.check(tokenizers, json.loads(path.read_text()))


def test_the_corpus_is_there() -> None:
    assert len(CASES) > 10


def test_random_cases(tokenizers: Any) -> None:
    source = random.Random(20261)
    met: Counter[str] = Counter()
    for number in range(300):
        given = fuzz_tokenizer.case(source)
        try:
            met += fuzz_tokenizer.check(tokenizers, given)
        except Exception as error:
            raise AssertionError(f"case {number}: {json.dumps(given)}") from error
    assert met["rows"] > 100
    assert met["file refused"] > 3


def test_a_wrong_tokenizer_is_found(tokenizers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks are no ornament: spans moved by one are noticed."""
    from xlmr_ext.tokenizer import tokens

    align = tokens._align

    def moved(*arguments: Any) -> Any:
        starts, ends, space, unknown = align(*arguments)
        return starts + 1, ends + 1, space, unknown

    monkeypatch.setattr(tokens, "_align", moved)
    path = fuzz_tokenizer.CORPUS / "composed-and-dropped.json"
    with pytest.raises(AssertionError):
        fuzz_tokenizer.check(tokenizers, json.loads(path.read_text()))
