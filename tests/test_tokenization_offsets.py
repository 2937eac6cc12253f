"""Which stretch of its text every token stands for, against transformers and by itself."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_oracle import check_spans, differences

from xlmr_ext.tokenization import XLMRobertaTokenizer

pytest_plugins = ["tokenizer_fixtures"]


def spans(tokenizer: XLMRobertaTokenizer, text: Any, **options: Any) -> list[tuple[str, Any]]:
    batch = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False, **options)
    return list(zip(batch.tokens(), batch["offset_mapping"], strict=True))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello world", [("▁Hello", (0, 5)), ("▁world", (6, 11))]),
        # The space that the tokenizer adds comes from nowhere; spaces of the text are left out.
        ("  two \t spaces ", [("▁two", (2, 5)), ("▁space", (8, 13)), ("s", (13, 14))]),
        # Longer in the normalized text ...
        ("ﬁ ﬀ", [("▁fi", (0, 1)), ("▁ff", (2, 3))]),
        ("㍿ x", [("▁", (0, 1)), ("株式会社", (0, 1)), ("▁x", (2, 3))]),
        ("½", [("▁1⁄2", (0, 1))]),
        # ... as long but other characters ...
        ("ＡＢＣ　ｄｅｆ", [("▁ABC", (0, 3)), ("▁de", (4, 6)), ("f", (6, 7))]),
        # ... and shorter: letters and their combining accents.
        ("a\u0301 e\u0301b", [("▁á", (0, 2)), ("▁é", (3, 5)), ("b", (5, 6))]),
        ("\u1100\u1161\u11a8 x", [("▁각", (0, 3)), ("▁x", (4, 5))]),
        # Control characters vanish; at the end of a token they are not its own.
        ("a\x01b\x01 \x02c", [("▁ab", (0, 3)), ("▁c", (6, 7))]),
        # Emoji joined by U+200D, which becomes a space.
        ("👩\u200d👩 hi", [("▁", (0, 1)), ("👩", (0, 1)), ("▁", (2, 3)), ("👩", (2, 3)),
                           ("▁hi", (4, 6))]),
        # Special tokens in the text; <mask> counts the space on its left as its own.
        ("a <mask> b </s>c", [("▁a", (0, 1)), ("<mask>", (1, 8)), ("▁b", (9, 10)),
                              ("</s>", (11, 15)), ("▁c", (15, 16))]),
        # Unknown characters, which are one token each run.
        ("x\0\u0378y", [("▁x", (0, 1)), ("\0\u0378", (1, 3)), ("y", (3, 4))]),
        # Surrogates: a pair is two places in a str, a lone one is read as a space.
        ("\ud83d\ude00 a \ud800b", [("▁😀", (0, 2)), ("▁a", (3, 4)), ("▁b", (6, 7))]),
        ("", []),
        (" \u200b", []),
    ],
)  # fmt: skip
def test_spans_by_hand(
    real: XLMRobertaTokenizer, text: str, expected: list[tuple[str, tuple[int, int]]]
) -> None:
    assert spans(real, text) == expected
    # The same beside other texts, and as arrays.
    batch = real(["x y", text, "ﬁ"], return_offsets_mapping=True, padding=True, return_tensors="np")
    rows = batch["offset_mapping"]
    assert rows.dtype == np.int64
    assert rows[1, 1 : len(expected) + 1].tolist() == [list(span) for _, span in expected]
    assert not rows[1, len(expected) + 1 :].any()
    tensor = real([text], return_offsets_mapping=True, return_tensors="pt")["offset_mapping"]
    assert tensor.shape == (1, len(expected) + 2, 2)
    assert tensor.dtype == torch.int64


def test_words_have_spans_of_their_own(real: XLMRobertaTokenizer) -> None:
    words = ["ﬁsh", "", "New York", "e\u0301", "<mask>", " "]
    assert spans(real, words, is_split_into_words=True) == [
        ("▁fish", (0, 3)),
        ("▁New", (0, 3)),
        ("▁York", (4, 8)),
        ("▁é", (0, 2)),
        ("<mask>", (0, 6)),
    ]
    batch = real(words, is_split_into_words=True)
    assert batch.word_ids() == [None, 0, 2, 2, 3, 4, None]


def test_a_long_text_is_cut_at_spaces_without_a_trace(real: XLMRobertaTokenizer) -> None:
    sentence = "The quick brown fox, très élégant, springt über 3 faule Hunde. "
    count = 400
    text = sentence * count
    one = real(sentence, return_offsets_mapping=True, add_special_tokens=False)
    whole = real(text, return_offsets_mapping=True, add_special_tokens=False, verbose=False)
    assert whole["input_ids"] == one["input_ids"] * count
    expected = [
        (start + i * len(sentence), end + i * len(sentence))
        for i in range(count)
        for start, end in one["offset_mapping"]
    ]
    assert whole["offset_mapping"] == expected
    words = len(sentence.split())
    assert whole.word_ids() == [w + i * words for i in range(count) for w in one.word_ids()]


def test_sentencepiece_alone_loses_digits_on_long_texts(
    real: XLMRobertaTokenizer, data_dir: Path
) -> None:
    """Why long texts are cut: what is chosen would depend on what was read before."""
    text = " ".join(sib(data_dir, "fra_Latn"))
    model = real._pieces.model
    ids = [i + 1 for word in text.split() for i in model.encode(word)]
    assert [i + 1 for i in model.encode(text)] != ids
    ours = real(text, add_special_tokens=False, verbose=False)["input_ids"]
    different = sum(a != b for a, b in zip(ours, ids, strict=True))
    assert different <= 2  # ties


def sib(data_dir: Path, language: str) -> list[str]:
    rows = []
    for path in sorted((data_dir / "sib200" / language).glob("*.tsv")):
        rows += [line.split("\t")[2] for line in path.read_bytes().decode().split("\n")[1:] if line]
    return rows


def texts_of_everything(data_dir: Path) -> list[str]:
    """SIB-200's sentences, the NER sentences as written and as words, XQuAD's texts."""
    texts = []
    for folder in sorted((data_dir / "sib200").iterdir()):
        if folder.is_dir():
            texts += sib(data_dir, folder.name)
    for path in sorted((data_dir / "ner").glob("*/*.iob2")):
        words: list[str] = []
        for line in path.read_bytes().decode().split("\n"):
            if line.startswith("# text = "):
                texts.append(line.removeprefix("# text = "))
            elif line and not line.startswith("#"):
                words.append(line.split("\t")[1])
            elif words:
                texts.append(" ".join(words))
                words = []
    for path in sorted((data_dir / "xquad").glob("*.json")):
        for article in json.loads(path.read_bytes())["data"]:
            for paragraph in article["paragraphs"]:
                texts.append(paragraph["context"])
                texts += [question["question"] for question in paragraph["qas"]]
    return texts


def test_all_texts_are_as_transformers_has_them(
    both_real: tuple[XLMRobertaTokenizer, Any], data_dir: Path
) -> None:
    ours, theirs = both_real
    texts = texts_of_everything(data_dir)
    assert len(texts) > 20_000
    found = differences(ours, theirs, texts)
    # Rows of one punctuation mark and a few words, where two segmentations weigh the same.
    assert Counter(reason for reason, _ in found) == {"tie": len(found)}
    assert len(found) <= 20


def test_the_words_of_the_ner_data(
    both_real: tuple[XLMRobertaTokenizer, Any], data_dir: Path
) -> None:
    ours, theirs = both_real
    sentences: list[list[str]] = [[]]
    for line in (
        (data_dir / "ner/uner_de_pud/de_pud-ud-test.iob2").read_bytes().decode().split("\n")
    ):
        if line and not line.startswith("#"):
            sentences[-1].append(line.split("\t")[1])
        elif sentences[-1]:
            sentences.append([])
    sentences = [words for words in sentences if words]
    options: dict[str, Any] = {"is_split_into_words": True, "return_offsets_mapping": True}
    got, expected = ours(sentences, **options), theirs(sentences, **options)
    assert got["input_ids"] == expected["input_ids"]
    assert got["offset_mapping"] == expected["offset_mapping"]
    for row in range(len(sentences)):
        assert got.word_ids(row) == expected.word_ids(row)


# -- any text ------------------------------------------------------------------------------------

_POOLS = st.sampled_from(
    ["ab ", "é", "ﬁ㍿½①Ａ　…", "\u0301\u0308\u20dd", "ंका", "가\u1100\u1161\u11a8", "ำเ",
     "👩\u200d👧🏽🇩🇪",
     "\u200b\u00ad\u2028\u00a0", "\0\x01\x0b\x1f\x7f\x85\x9f\t\n", "今天。", "\u2581", "שלום"]
).flatmap(st.sampled_from)  # fmt: skip
_CHARACTER = _POOLS | st.characters(codec="utf-8") | st.sampled_from(["<mask>", "</s>", " "])
_TEXT = st.lists(_CHARACTER, max_size=12).map("".join)


@settings(max_examples=300, deadline=None)
@given(texts=st.lists(_TEXT, min_size=1, max_size=6))
def test_any_text_differs_from_transformers_for_known_reasons(
    both_real: tuple[XLMRobertaTokenizer, Any], texts: list[str]
) -> None:
    differences(*both_real, texts)


@settings(max_examples=200, deadline=None)
@given(text=st.lists(_CHARACTER | st.characters(), max_size=12).map("".join))
def test_spans_of_any_str_hold_their_tokens(tokenizer_once: XLMRobertaTokenizer, text: str) -> None:
    batch = tokenizer_once([text, "x"], return_offsets_mapping=True)
    check_spans(tokenizer_once, text, batch.tokens(0), batch["offset_mapping"][0])


@pytest.fixture(scope="module")
def tokenizer_once(tiny_folder: Path) -> XLMRobertaTokenizer:
    return XLMRobertaTokenizer.from_pretrained(tiny_folder)


def test_plain_texts_have_no_excuse(both_real: tuple[XLMRobertaTokenizer, Any]) -> None:
    """The reasons are reasons: without unusual characters there is no difference at all."""
    ours, theirs = both_real
    texts = [
        "ﬁ ½ ㍿ Ａ",
        "👩 hi 👧",
        "한국어 텍스트",
        "เมืองไทย",
        "हिन्दी में",
        "a\u00a0b\u3000c",
        "x\0y",
    ]
    assert differences(ours, theirs, texts) == []
    for text, reason in (
        ("…\u0301", "normal form"),
        ("a\x85b", "normal form"),
        ("e\u0301", "composed"),
        ("\x01ab", "dropped"),
        ("=" * 78, "tie"),
    ):
        assert differences(ours, theirs, [text]) == [(reason, text)]
