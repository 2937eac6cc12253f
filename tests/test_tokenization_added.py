"""Special and added tokens against transformers: found, counted, decoded."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xlmr_ext.tokenization import XLMRobertaTokenizer
from xlmr_ext.tokenizer.added_tokens import AddedToken, Matcher

pytest_plugins = ["tokenizer_fixtures"]

_NORMALIZED = ["newword", "fi", "Über", "㎏", "two words"]
_TEXTS = [
    "a newword b", "anewwordb newword", "ﬁx fi f i", "ＮＥＷ newword", "u\u0308ber Über",
    "5㎏ and 5kg", "two words twowords","<e1><e1> <e2>", " <left> x <left>",
    "x<right>  y", "alone a_lone x alone", "<both>  <both>", "", "newword", " newword ",
    "<mask>newword<mask>", "new newword", "Überfi", "x </s> y", "\u3000newword\u3000",
]  # fmt: skip


def add(tokenizer: Any, kind: Any) -> list[int]:
    return [
        tokenizer.add_tokens(_NORMALIZED),
        tokenizer.add_tokens("newword"),
        tokenizer.add_tokens([kind("<left>", lstrip=True, normalized=False)]),
        tokenizer.add_tokens([kind("<right>", rstrip=True), kind("lone", single_word=True)]),
        tokenizer.add_tokens(["<both>", kind("<both>", lstrip=True, rstrip=True)]),
        tokenizer.add_tokens(["<e2>"], special_tokens=True),
        tokenizer.add_special_tokens({"additional_special_tokens": ["<e1>", "<e2>"]}),
        tokenizer.add_special_tokens({"extra_special_tokens": ["<e3>"]}, False),
        tokenizer.add_special_tokens({"cls_token": "<cls>", "pad_token": "<pad>"}),
        tokenizer.add_tokens([]),
    ]


@pytest.fixture
def added(tiny_folder: Path, tmp_path: Path) -> tuple[XLMRobertaTokenizer, Any]:
    transformers = pytest.importorskip("transformers")
    ours = XLMRobertaTokenizer.from_pretrained(tiny_folder)
    ours.save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    counts = add(theirs, transformers.AddedToken)
    assert counts == add(ours, transformers.AddedToken)  # theirs is taken as it is
    return ours, theirs


def test_added_tokens_are_as_transformers_has_them(added: tuple[XLMRobertaTokenizer, Any]) -> None:
    ours, theirs = added
    assert ours.get_vocab() == ours.vocab == theirs.get_vocab()
    assert len(ours) == len(theirs)
    assert ours.vocab_size == theirs.vocab_size
    assert ours.get_added_vocab() == theirs.get_added_vocab()
    assert ours.added_tokens_encoder == theirs.added_tokens_encoder
    assert ours.all_special_tokens == theirs.all_special_tokens
    assert ours.all_special_ids == theirs.all_special_ids
    assert ours.extra_special_tokens == theirs.extra_special_tokens == ["<e1>", "<e2>", "<e3>"]
    assert ours.extra_special_tokens_ids == theirs.extra_special_tokens_ids
    assert ours.cls_token == theirs.cls_token == "<cls>"
    assert ours.special_tokens_map == theirs.special_tokens_map
    for index, token in theirs.added_tokens_decoder.items():
        assert repr(AddedToken.of(token)) == repr(ours.added_tokens_decoder[index])


@pytest.mark.parametrize("text", _TEXTS)
def test_texts_with_added_tokens(added: tuple[XLMRobertaTokenizer, Any], text: str) -> None:
    ours, theirs = added
    got = ours(text, return_offsets_mapping=True, return_special_tokens_mask=True)
    expected = theirs(text, return_offsets_mapping=True, return_special_tokens_mask=True)
    assert got["input_ids"] == expected["input_ids"]
    assert got["special_tokens_mask"] == expected["special_tokens_mask"]
    assert got.word_ids() == expected.word_ids()
    if "\u0308" not in text:  # of a composed letter they count the first code point alone
        assert got["offset_mapping"] == expected["offset_mapping"]
    for skip in (False, True):
        decoded = ours.decode(got["input_ids"], skip).replace("㎏", "kg")  # theirs is normalized
        assert decoded == theirs.decode(expected["input_ids"], skip)


@settings(max_examples=300, deadline=None)
@given(
    parts=st.lists(
        st.sampled_from([*_NORMALIZED, "<left>", "<both>", "<right>", "lone", "<e1>", " ", "  ",
                         "ﬁ", "x", "u\u0308", "\t", "Ü", "<mask>", "new", "word"]),
        max_size=8,
    )
)  # fmt: skip
def test_any_mixture_of_added_tokens(
    added_once: tuple[XLMRobertaTokenizer, Any], parts: list[str]
) -> None:
    ours, theirs = added_once
    text = "".join(parts)
    got, expected = (t(text, return_offsets_mapping=True) for t in (ours, theirs))
    assert got["input_ids"] == expected["input_ids"]
    assert got.word_ids() == expected.word_ids()
    if "\u0308" not in text:
        assert got["offset_mapping"] == expected["offset_mapping"]


@pytest.fixture(scope="module")
def added_once(
    tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[XLMRobertaTokenizer, Any]:
    transformers = pytest.importorskip("transformers")
    ours = XLMRobertaTokenizer.from_pretrained(tiny_folder)
    folder = tmp_path_factory.mktemp("added")
    ours.save_pretrained(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for tokenizer in (ours, theirs):
        add(tokenizer, transformers.AddedToken)
    return ours, theirs


def test_a_piece_of_the_vocabulary_can_be_added(tokenizer: XLMRobertaTokenizer) -> None:
    piece = tokenizer.convert_ids_to_tokens(tokenizer.vocab_size - 2)
    assert tokenizer.add_tokens(piece) == 1
    assert len(tokenizer) == tokenizer.vocab_size
    assert tokenizer.encode(f"fox{piece}dog").count(tokenizer.vocab_size - 2) == 1


def test_roles_take_tokens_of_the_vocabulary(tokenizer: XLMRobertaTokenizer) -> None:
    tokenizer.pad_token = tokenizer.eos_token
    assert tokenizer.pad_token_id == 2
    assert tokenizer(["a", "a b"], padding=True)["input_ids"][0][-1] == 2
    tokenizer.pad_token_id = 1
    assert tokenizer.pad_token == "<pad>"
    with pytest.raises(ValueError, match=r"mask_token: '\[M\]' is not in .*add_special_tokens"):
        tokenizer.mask_token = "[M]"
    with pytest.raises(TypeError, match="pad_token: expected a str, got int"):
        tokenizer.pad_token = 1
    with pytest.raises(ValueError, match="ids: 9999 is not in"):
        tokenizer.pad_token_id = 9999
    tokenizer.add_special_tokens({"bos_token": "<start>", "mask_token": "[M]"})
    assert tokenizer.encode("a")[0] == tokenizer.vocab_size
    assert tokenizer.encode("a[M]")[-2] == tokenizer.mask_token_id == tokenizer.vocab_size + 1


def test_bad_tokens(tokenizer: XLMRobertaTokenizer) -> None:
    with pytest.raises(ValueError, match="'foo_token' is no role; expected one of bos_token"):
        tokenizer.add_special_tokens({"pad_token": "<x>", "foo_token": "<y>"})
    assert "<x>" not in tokenizer.get_vocab()  # nothing is half done
    with pytest.raises(TypeError, match="additional_special_tokens must be a list, got str"):
        tokenizer.add_special_tokens({"additional_special_tokens": "<x>"})
    with pytest.raises(TypeError, match=r"expected a token as a str, .* got int"):
        tokenizer.add_tokens([3])
    with pytest.raises(TypeError, match="content must be a str, got int"):
        AddedToken(3)  # type: ignore[arg-type]
    assert tokenizer.add_tokens("") == 0


def test_a_str_is_no_list_of_tokens(tiny_folder: Path) -> None:
    for value in ("abc", 7):
        with pytest.raises(TypeError, match="additional_special_tokens must be a list, got"):
            XLMRobertaTokenizer.from_pretrained(tiny_folder, additional_special_tokens=value)
    with pytest.raises(ValueError, match="half a character"):
        AddedToken("\ud800")


def test_rows_are_built_from_ids(tokenizer: XLMRobertaTokenizer) -> None:
    a, b = ([7, 8], [9])
    single, pair = (tokenizer.build_inputs_with_special_tokens(a, other) for other in (None, b))
    assert (single, pair) == ([0, 7, 8, 2], [0, 7, 8, 2, 2, 9, 2])
    assert tokenizer.create_token_type_ids_from_sequences(a, b) == [0] * 7
    for other, row in ((None, single), (b, pair)):
        mask = tokenizer.get_special_tokens_mask(a, other)
        assert mask == tokenizer.get_special_tokens_mask(row, already_has_special_tokens=True)
    with pytest.raises(ValueError, match="token_ids_1"):
        tokenizer.get_special_tokens_mask(single, b, already_has_special_tokens=True)
    assert tokenizer.max_len_single_sentence == 510
    assert tokenizer.max_len_sentences_pair == 508


def test_added_tokens_survive_copies(added: tuple[XLMRobertaTokenizer, Any]) -> None:
    ours, _ = added
    for twin in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
        assert twin.added_tokens_decoder == ours.added_tokens_decoder
        assert twin(_TEXTS, return_offsets_mapping=True) == ours(
            _TEXTS, return_offsets_mapping=True
        )
    twin.add_tokens("<later>")
    assert "<later>" not in ours.get_vocab()


def test_finding_is_linear_and_takes_the_longest() -> None:
    matcher = Matcher([AddedToken("ab"), AddedToken("abc", lstrip=True), AddedToken("b c")])
    assert [(f.start, f.end, str(f.token)) for f in matcher.find("ab  abcab cb c")] == [
        (0, 2, "ab"), (2, 7, "abc"), (7, 9, "ab"), (11, 14, "b c"),
    ]  # fmt: skip
    assert list(Matcher([]).find("abc")) == []
