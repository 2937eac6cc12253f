"""The demo's corpus: English sentences to train on, the same test sentences in many languages.

Written for this project. ``corpus/train.tsv`` has columns label and text, ``corpus/test/CODE.tsv``
id, label and text, where a row means the same in every language; ``corpus/languages.tsv`` names
the languages. All are files that ``xlmr-ext finetune`` and ``xlmr-ext predict`` read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from xlmr_ext.data import LabelledTexts, read_labelled

__all__ = ["CORPUS", "Language", "evaluation_sentences", "languages", "training_sentences"]

CORPUS = Path(__file__).parent / "corpus"


@dataclass(frozen=True)
class Language:
    """A language of the test sentences: its ISO 639-1 code, its names, its script."""

    code: str
    name: str
    endonym: str
    script: str


def languages() -> list[Language]:
    """The languages of the corpus, English first, grouped by script."""
    rows = (CORPUS / "languages.tsv").read_text(encoding="utf-8").splitlines()
    return [Language(*row.split("\t")) for row in rows[1:]]


def training_sentences() -> LabelledTexts:
    """The English sentences to train on, with their topics."""
    return read_labelled(CORPUS / "train.tsv")


def evaluation_sentences(language: Language) -> LabelledTexts:
    """The test sentences in one language; row i means the same in every language."""
    return read_labelled(CORPUS / "test" / f"{language.code}.tsv")
