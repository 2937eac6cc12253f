"""Windows over long texts: rows of what truncation cuts off, as transformers makes them."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xlmr_ext.tokenization import XLMRobertaTokenizer

pytest_plugins = ["tokenizer_fixtures"]

LETTERS = "a b c d e f g"
OTHERS = "h i j k l m"

_WORD = st.sampled_from(
    ["the", "quick", "über", "книгу", "今天天气", "x", "<mask>", "</s>", "wizards"]
)
_TEXT = st.lists(_WORD, max_size=10).map(" ".join)
_WORDS = st.lists(_WORD | st.just("") | st.just("two words"), min_size=1, max_size=8)


@st.composite
def calls(draw: st.DrawFn) -> tuple[Any, Any, dict[str, Any]]:
    """Texts, second texts or None, and options."""
    words = draw(st.booleans())
    kind: Any = _WORDS if words else _TEXT
    count = draw(st.integers(0, 3))  # 0: no batch
    pairs = draw(st.booleans())
    if count:
        first = draw(st.lists(kind, min_size=count, max_size=count))
        second = draw(st.lists(kind, min_size=count, max_size=count)) if pairs else None
    else:
        first = draw(kind)
        second = draw(kind.filter(bool)) if pairs else None
    truncations = [True, False, "only_first", "longest_first", *(["only_second"] if pairs else [])]
    flags = ("return_overflowing_tokens", "add_special_tokens")
    return first, second, {
        "truncation": draw(st.sampled_from(truncations)),
        "max_length": draw(st.integers(5, 25)),
        "stride": draw(st.integers(0, 3)),
        "padding": draw(st.sampled_from([False, True, "max_length"])),
        "is_split_into_words": words,
        "return_offsets_mapping": True,
        "return_special_tokens_mask": True,
        "verbose": False,
        **{flag: draw(st.booleans()) for flag in flags},
    }  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(
    call=calls(), side=st.sampled_from(["left", "right"]), pad=st.sampled_from(["left", "right"])
)
def test_every_column_is_as_transformers_has_it(
    both_tiny: tuple[XLMRobertaTokenizer, Any], call: tuple[Any, Any, Any], side: str, pad: str
) -> None:
    ours, theirs = both_tiny
    first, second, options = call
    ours.truncation_side = theirs.truncation_side = side
    got: Any = None
    expected: Any = None
    with contextlib.suppress(ValueError):
        got = ours(first, second, padding_side=pad, **options)
    # Theirs panics where a window is no longer than the stride, which is no Exception.
    with contextlib.suppress(BaseException):
        expected = theirs(first, second, padding_side=pad, **options)
    ours.truncation_side = theirs.truncation_side = "right"
    if expected is None:
        return
    assert got is not None
    assert dict(got) == dict(expected)
    for row, encoding in enumerate(expected.encodings):
        assert got.sequence_ids(row) == expected.sequence_ids(row)
        assert got.word_ids(row) == expected.word_ids(row)
        assert got.tokens(row) == [token.strip(" ") for token in expected.tokens(row)]
        assert got.n_sequences == encoding.n_sequences
        for sequence in range(1 if second is None else 2):
            for place in range(12):
                for name in ("char_to_token", "word_to_tokens", "char_to_word", "word_to_chars"):
                    try:
                        wanted = getattr(expected, name)(row, place, sequence)
                    except TypeError:  # of None, where theirs takes it apart
                        wanted = None
                    assert getattr(got, name)(row, place, sequence) == wanted
        for token in range(len(encoding.ids)):
            for name in ("token_to_chars", "token_to_word", "token_to_sequence"):
                assert getattr(got, name)(row, token) == getattr(expected, name)(row, token)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(("limit", "stride"), [(5, 0), (5, 1), (5, 2), (7, 3), (9, 0), (40, 5)])
def test_windows_by_hand(
    real: XLMRobertaTokenizer, side: str, limit: int, stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(real, "truncation_side", side)
    ids = real.encode(LETTERS * 3, add_special_tokens=False)
    batch = real(
        LETTERS * 3, truncation=True, max_length=limit, stride=stride, padding=False,
        return_overflowing_tokens=True,
    )  # fmt: skip
    room = limit - 2
    rows = [row[1:-1] for row in batch["input_ids"]]
    assert all(row[0] == 0 and row[-1] == 2 for row in batch["input_ids"])
    assert batch["overflow_to_sample_mapping"] == [0] * len(rows)
    step = room - stride
    if side == "right":
        starts = [s for s in range(0, len(ids), step) if s == 0 or s - step + room < len(ids)]
        assert rows == [ids[s : s + room] for s in starts]
    else:
        assert rows[0] == ids[-room:]
        assert rows[-1][0] == ids[0]
        assert all(a[:stride] == b[len(b) - stride :] for a, b in itertools.pairwise(rows))
    covered = {index for row in rows for index in row}
    assert covered == set(ids)


def test_rows_of_a_batch_are_flat(real: XLMRobertaTokenizer) -> None:
    batch = real(
        [LETTERS, "a", OTHERS], truncation=True, max_length=5, stride=1, padding=True,
        return_overflowing_tokens=True, return_tensors="pt", return_length=True,
    )  # fmt: skip
    assert batch["overflow_to_sample_mapping"].tolist() == [0, 0, 0, 1, 2, 2, 2]
    assert batch.input_ids.shape == batch.attention_mask.shape == (7, 5)
    assert batch["length"].tolist() == batch.attention_mask.sum(1).tolist()
    # Without truncation there is nothing to overflow.
    whole = real([LETTERS, "a"], return_overflowing_tokens=True)
    assert whole["overflow_to_sample_mapping"] == [0, 1]
    assert whole["input_ids"] == real([LETTERS, "a"])["input_ids"]
    none = real([], return_overflowing_tokens=True, return_tensors="np")
    assert none["overflow_to_sample_mapping"].shape == (0,)


def test_token_types_of_overflowing_pairs_are_zero(
    both_real: tuple[XLMRobertaTokenizer, Any],
) -> None:
    """XLM-R has one token type; theirs has ones here, which would be out of its table."""
    got, expected = (
        t(
            [LETTERS], [OTHERS], truncation="only_second", max_length=14, stride=1,
            return_overflowing_tokens=True, return_token_type_ids=True,
        )
        for t in both_real
    )  # fmt: skip
    assert got["input_ids"] == expected["input_ids"]
    assert not np.any(np.concatenate(got["token_type_ids"]))


@pytest.mark.parametrize(
    ("arguments", "options", "match"),
    [
        ((LETTERS,), {"max_length": 5, "stride": 3}, "stride: 3 tokens, .*room for 3"),
        ((LETTERS,), {"max_length": 2}, "it leaves 0 of text's 7 tokens to a window"),
        ((LETTERS, OTHERS), {"max_length": 10, "stride": 3}, "leaves 3 of text's 7 tokens"),
        (
            (LETTERS, OTHERS),
            {"max_length": 12, "stride": 1, "truncation": "only_second"},
            "leaves 1 of text_pair's 6 tokens to a window, expected more than the stride of 1",
        ),
        ((LETTERS, OTHERS), {"max_length": 5}, "leaves 0 of text_pair's|leaves 0 of text's"),
    ],
)  # fmt: skip
def test_windows_that_would_never_end(
    real: XLMRobertaTokenizer, arguments: Any, options: dict[str, Any], match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        real(*arguments, **{"truncation": True, "return_overflowing_tokens": True, **options})


@pytest.mark.parametrize("overflow", [False, True])
def test_a_stride_is_for_texts_that_are_cut(
    both: tuple[XLMRobertaTokenizer, Any], overflow: bool
) -> None:
    options = {"truncation": True, "stride": 3, "return_overflowing_tokens": overflow}
    for texts in ([""], [""]), (["a"], [""]), (["a"],):
        limit = 3 + 2 * len(texts)  # one more than the special tokens
        ours, theirs = (side(*texts, max_length=limit, **options) for side in both)
        assert ours["input_ids"] == theirs["input_ids"]


@pytest.mark.parametrize("kind", ["pt", "np", None])
def test_doc_stride_finds_every_answer(tokenizer: XLMRobertaTokenizer, kind: str | None) -> None:
    """As question answering uses it: each window's spans point into the one context."""
    context = " ".join(f"word{n} über ﬁ" for n in range(40))
    batch = tokenizer(
        ["who"], [context], truncation="only_second", max_length=48, stride=16,
        padding="max_length", return_overflowing_tokens=True, return_offsets_mapping=True,
        return_tensors=kind,
    )  # fmt: skip
    seen: set[int] = set()
    for row in range(len(batch["input_ids"])):
        assert len(batch["input_ids"][row]) == 48
        sequence = batch.sequence_ids(row)
        for index, (start, end) in enumerate(batch["offset_mapping"][row]):
            if sequence[index] == 1:
                seen.update(range(int(start), int(end)))
                assert batch.char_to_token(row, int(start), 1) <= index
    assert {place for place, letter in enumerate(context) if letter != " "} == seen
