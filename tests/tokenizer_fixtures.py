"""Fixtures of the tokenizer's tests: vocabularies, our tokenizer, and transformers' beside it.

A test file takes them with ``pytest_plugins = ["tokenizer_fixtures"]``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import xlmr_vocabulary

from xlmr_ext.tokenization import XLMRobertaTokenizer


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    xlmr_vocabulary.write_tiny_vocabulary(folder)
    return folder


@pytest.fixture(scope="session")
def real_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real")
    xlmr_vocabulary.write_real_vocabulary(folder)
    return folder


@pytest.fixture
def tokenizer(tiny_folder: Path) -> XLMRobertaTokenizer:
    return XLMRobertaTokenizer.from_pretrained(tiny_folder)


@pytest.fixture(scope="session")
def real(real_folder: Path) -> XLMRobertaTokenizer:
    return XLMRobertaTokenizer.from_pretrained(real_folder)


@pytest.fixture(params=["tiny", "real"])
def folder(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(f"{request.param}_folder")
    return path


_PAIRS: dict[Path, tuple[XLMRobertaTokenizer, Any]] = {}


def _load_both(folder: Path) -> tuple[XLMRobertaTokenizer, Any]:
    """Ours, and transformers' of what ours saves; loaded once, as the real one takes seconds."""
    transformers = pytest.importorskip("transformers")
    if folder not in _PAIRS:
        ours = XLMRobertaTokenizer.from_pretrained(folder)
        ours.save_pretrained(folder / "saved")
        _PAIRS[folder] = ours, transformers.AutoTokenizer.from_pretrained(folder / "saved")
    return _PAIRS[folder]


@pytest.fixture
def both(folder: Path) -> Iterator[tuple[XLMRobertaTokenizer, Any]]:
    """A test may set the sides of padding and truncation."""
    pair = _load_both(folder)
    yield pair
    for tokenizer in pair:
        tokenizer.padding_side = tokenizer.truncation_side = "right"


@pytest.fixture(scope="session")
def both_tiny(tiny_folder: Path) -> tuple[XLMRobertaTokenizer, Any]:
    return _load_both(tiny_folder)


@pytest.fixture(scope="session")
def both_real(real_folder: Path) -> tuple[XLMRobertaTokenizer, Any]:
    return _load_both(real_folder)
