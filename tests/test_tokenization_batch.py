"""The result of a tokenizer's call as an object, and in the hands of other libraries."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from xlmr_ext.tokenization import BatchEncoding, XLMRobertaTokenizer
from xlmr_ext.tokenizer.batch_encoding import CharSpan, TokenSpan

pytest_plugins = ["tokenizer_fixtures"]

FIRST = "The quick brown fox jumps over the lazy dog"


def test_columns(tokenizer: XLMRobertaTokenizer) -> None:
    batch = tokenizer(FIRST, return_tensors="pt")
    assert batch.input_ids is batch["input_ids"]
    assert isinstance(batch, dict)
    assert list({**batch}) == list(batch.data) == ["input_ids", "attention_mask"]
    with pytest.raises(AttributeError, match="no 'labels'; it holds input_ids, attention_mask"):
        _ = batch.labels
    ids = batch.input_ids
    assert batch.to("cpu") is batch
    assert torch.equal(batch.to("meta").input_ids.new_zeros(0, device="cpu"), ids[:0, 0])
    assert batch.input_ids.device.type == "meta"
    with pytest.raises(ValueError, match="not torch tensors"):
        tokenizer(FIRST).to("cpu")


def test_places(real: XLMRobertaTokenizer) -> None:
    batch = real(["Hello world", "unbelievable ﬁsh"])
    assert batch.tokens(1) == ["<s>", "▁un", "beli", "ev", "able", "▁fish", "</s>"]
    assert batch.word_ids(1) == [None, 0, 0, 0, 0, 1, None]
    assert batch.sequence_ids(1) == [None, 0, 0, 0, 0, 0, None]
    assert batch.token_to_chars(1, 2) == CharSpan(2, 6)
    assert batch.token_to_chars(0) is None
    assert batch.token_to_chars(2) == CharSpan(6, 11)  # of the first row
    assert batch.token_to_word(1, 5) == 1
    assert batch.token_to_word(1, 0) is batch.token_to_sequence(1, 0) is None
    assert batch.char_to_token(1, 13) == batch.char_to_token(1, 15) == 5
    assert batch.char_to_token(1, 12) is batch.char_to_token(1, 99) is None
    assert batch.char_to_word(1, 3) == 0
    assert batch.word_to_tokens(1, 0) == TokenSpan(1, 5)
    assert batch.word_to_tokens(1, 7) is batch.word_to_chars(1, 7) is None
    assert batch.word_to_chars(1, 1) == CharSpan(13, 16)
    assert batch.tokens(-1) == batch.tokens(1)
    assert batch.n_sequences == 1
    assert batch.is_fast
    with pytest.raises(IndexError, match="row 2: the batch has 2 rows"):
        batch.word_ids(2)
    pair = real("a", "b c", padding="max_length", max_length=9, return_tensors="np")
    assert pair.sequence_ids() == [None, 0, None, None, 1, 1, None, None, None]
    assert pair.n_sequences == 2
    assert pair.char_to_token(0, sequence_index=1) == 4


def test_batches_of_other_origin_say_so(tokenizer: XLMRobertaTokenizer) -> None:
    for batch in (tokenizer.pad([tokenizer("a")]), BatchEncoding({"input_ids": [[0, 2]]})):
        assert not batch.is_fast
        assert batch.n_sequences is None
        for name in ("tokens", "word_ids", "sequence_ids"):
            with pytest.raises(ValueError, match=f"{name}: only the result of a tokenizer's call"):
                getattr(batch, name)(0)
        with pytest.raises(ValueError, match="char_to_token: only"):
            batch.char_to_token(0, 1)


def test_copies_keep_everything_without_the_tokenizer(tokenizer: XLMRobertaTokenizer) -> None:
    batch = tokenizer([FIRST, "ﬁ\0 x"], padding=True)
    twins = [
        pickle.loads(pickle.dumps(batch)),
        copy.deepcopy(batch),
        copy.copy(batch),
        batch.copy(),
    ]
    assert len(pickle.dumps(batch)) < 10_000
    for twin in twins:
        assert twin == batch
        assert type(twin) is BatchEncoding
        for row in (0, 1):
            assert twin.tokens(row) == batch.tokens(row)
            assert twin.word_ids(row) == batch.word_ids(row)
            assert twin.token_to_chars(row, 1) == batch.token_to_chars(row, 1)
    twins[1]["input_ids"][0][0] = 9
    assert batch["input_ids"][0][0] == 0


def test_convert_to_tensors(tokenizer: XLMRobertaTokenizer) -> None:
    batch = tokenizer(["a b", "c"], padding=True)
    expected = batch["input_ids"]
    assert batch.convert_to_tensors() is batch
    assert batch.convert_to_tensors("np").input_ids.tolist() == expected
    assert isinstance(batch.convert_to_tensors("pt").input_ids, np.ndarray)  # as they are
    tensors = tokenizer(["a b", "c"], padding=True).convert_to_tensors("pt")
    assert tensors.input_ids.tolist() == expected
    with pytest.raises(ValueError, match="2 different lengths"):
        tokenizer(["a b", "c"]).convert_to_tensors("pt")


def test_collators_of_transformers_take_it(tokenizer: XLMRobertaTokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    features: list[dict[str, Any]] = [
        {**tokenizer(text, return_special_tokens_mask=True), "labels": n}
        for n, text in enumerate([FIRST, "a"])
    ]
    batch = transformers.DataCollatorWithPadding(tokenizer)([dict(f) for f in features])
    assert isinstance(batch, Mapping)
    assert batch["labels"].tolist() == [0, 1]
    assert batch["input_ids"].shape == batch["special_tokens_mask"].shape

    words = [{**tokenizer(text), "labels": tokenizer(text)["input_ids"]} for text in (FIRST, "a")]
    batch = transformers.DataCollatorForTokenClassification(tokenizer)(words)
    assert batch["labels"][1].tolist()[-1] == -100
    assert batch["labels"][0].tolist() == batch["input_ids"][0].tolist()

    torch.manual_seed(1)
    masking = transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.5)
    for feature in features:
        del feature["labels"]
    batch = masking(features)
    masked = batch["labels"] != -100
    assert masked.any()
    assert not masked[:, 0].any()  # never the special tokens
    assert (batch["input_ids"] == tokenizer.mask_token_id).any()


def test_loaders_and_accelerate_take_it(tokenizer: XLMRobertaTokenizer) -> None:
    texts = [FIRST, "a", "b c"]
    loader: Any = torch.utils.data.DataLoader(
        texts,  # type: ignore[arg-type]
        batch_size=2,
        collate_fn=lambda rows: tokenizer(rows, padding=True, return_tensors="pt"),
    )
    batches = list(loader)
    assert [len(batch.input_ids) for batch in batches] == [2, 1]
    operations = pytest.importorskip("accelerate.utils.operations")
    moved = operations.send_to_device(batches[0], torch.device("meta"))
    assert moved["input_ids"].device.type == "meta"
    assert operations.find_batch_size(batches[1]) == 1


def test_words_may_come_in_many_shapes(tokenizer: XLMRobertaTokenizer, tiny_folder: Path) -> None:
    def ids(text: Any, pair: Any = None) -> Any:
        return tokenizer(text, pair, is_split_into_words=True)["input_ids"]

    one, two = ["the", "quick fox"], ["lazy"]
    single = ids(one)
    assert single == tokenizer("the quick fox")["input_ids"]
    assert ids(tuple(one)) == single
    assert ids([one, two]) == [single, ids(two)]
    assert ids([tuple(one), tuple(two)]) == [single, ids(two)]
    pair = ids(one, two)
    assert pair == tokenizer("the quick fox", "lazy")["input_ids"]
    assert ids([one], [two]) == ids([(one, two)]) == [pair]
    assert ids([]) == [0, 2]
    assert ids([[]]) == [[0, 2]]
    assert tokenizer.encode(one, is_split_into_words=True) == single  # type: ignore[arg-type]
    for bad, match in (
        ("the", "needs a list of words, got str"),
        (["a", 3], r"text\[1\]: expected a str, got int"),
        ([["a"], "b"], r"text\[1\]: expected a list of words, got str"),
        ([["a", None]], r"text\[0\]\[1\]: expected a str, got NoneType"),
        (3, "text: expected a str, a list"),
    ):
        with pytest.raises(TypeError, match=match):
            ids(bad)
    with pytest.raises(ValueError, match="text_pair: 1 texts, but text has 2"):
        ids([one, two], [one])
    with pytest.raises(TypeError, match="text_pair: expected a list of words, got str"):
        ids(one, "lazy")
