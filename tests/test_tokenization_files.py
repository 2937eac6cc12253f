"""The tokenizer's files: saved, loaded, exchanged with transformers, damaged."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xlmr_vocabulary

from xlmr_ext.tokenization import XLMRobertaTokenizer
from xlmr_ext.tokenizer.added_tokens import AddedToken

pytest_plugins = ["tokenizer_fixtures"]

FIRST = "The quick brown fox jumps over the lazy dog"
SECOND = "Мы читали новую книгу"


def test_save_and_load(folder: Path, tmp_path: Path) -> None:
    tokenizer = XLMRobertaTokenizer.from_pretrained(
        folder, model_max_length=77, padding_side="left", truncation_side="left"
    )
    paths = tokenizer.save_pretrained(tmp_path / "new" / "folder")
    assert sorted(Path(path).name for path in paths) == [
        "sentencepiece.bpe.model",
        "special_tokens_map.json",
        "tokenizer_config.json",
    ]
    assert sorted(map(str, (tmp_path / "new/folder").iterdir())) == sorted(paths)
    written = (tmp_path / "new/folder/sentencepiece.bpe.model").read_bytes()
    assert written == (folder / "sentencepiece.bpe.model").read_bytes()
    again = XLMRobertaTokenizer.from_pretrained(tmp_path / "new/folder")
    assert (again.model_max_length, again.padding_side, again.truncation_side) == (
        77,
        "left",
        "left",
    )
    texts = [FIRST, "a <mask> b"]
    assert again(texts, padding=True) == tokenizer(texts, padding=True)
    assert (
        XLMRobertaTokenizer.from_pretrained(tmp_path / "new/folder", model_max_length=9)(
            FIRST, truncation=True
        )["input_ids"]
        == tokenizer(FIRST, max_length=9)["input_ids"]
    )


def test_transformers_loads_what_is_saved_and_the_other_way_round(
    both: tuple[XLMRobertaTokenizer, Any], tmp_path: Path
) -> None:
    ours, theirs = both
    assert type(theirs).__name__.startswith("XLMRobertaTokenizer")
    folder = tmp_path / "theirs"
    theirs.padding_side = "left"
    theirs.save_pretrained(folder)
    again = XLMRobertaTokenizer.from_pretrained(folder)
    assert again.padding_side == "left"
    assert again.model_max_length == ours.model_max_length
    texts = [FIRST, SECOND, "a <mask> b", "a\0b", " "]
    assert again(texts) == ours(texts)
    assert again.get_vocab() == ours.get_vocab()


def test_missing_files_are_named(tmp_path: Path, tiny_folder: Path) -> None:
    with pytest.raises(OSError, match=r"sentencepiece\.bpe\.model.*tokenizer\.json"):
        XLMRobertaTokenizer.from_pretrained(tmp_path)
    with pytest.raises(OSError, match="absent"):
        XLMRobertaTokenizer.from_pretrained(tmp_path / "absent")
    with pytest.raises(OSError, match="file"):
        XLMRobertaTokenizer.from_pretrained(tiny_folder / "sentencepiece.bpe.model")
    with pytest.raises(OSError, match=r"nobody/nothing.*sentencepiece"):
        XLMRobertaTokenizer.from_pretrained(
            "nobody/nothing", local_files_only=True, cache_dir=tmp_path
        )
    with pytest.raises(OSError, match=r"none\.model"):
        XLMRobertaTokenizer(tmp_path / "none.model")


def test_a_model_in_the_hub_cache(tmp_path: Path, tiny_folder: Path) -> None:
    commit = "0" * 40
    snapshot = tmp_path / "models--some--model" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    XLMRobertaTokenizer.from_pretrained(tiny_folder, model_max_length=33).save_pretrained(snapshot)
    (tmp_path / "models--some--model/refs").mkdir()
    (tmp_path / "models--some--model/refs/main").write_text(commit)
    tokenizer = XLMRobertaTokenizer.from_pretrained(
        "some/model", cache_dir=tmp_path, local_files_only=True
    )
    assert tokenizer.model_max_length == 33


def test_damaged_files_are_refused(tmp_path: Path, tiny_folder: Path) -> None:
    whole = (tiny_folder / "sentencepiece.bpe.model").read_bytes()
    path = tmp_path / "sentencepiece.bpe.model"
    for data in (b"", b"version https://git-lfs.github.com/spec/v1", whole[:1000]):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="not a sentencepiece model"):
            XLMRobertaTokenizer.from_pretrained(tmp_path)
    path.write_bytes(whole)
    config = tmp_path / "tokenizer_config.json"
    for text, match in (
        ("{", "not a JSON file"),
        ("[]", "expected a JSON object"),
        ('{"tokenizer_class": "CamembertTokenizer"}', "tokenizer_class is 'CamembertTokenizer'"),
        ('{"model_max_length": "long"}', "model_max_length is 'long'"),
        ('{"model_max_length": -Infinity}', "config.json: model_max_length is -inf"),
        ('{"model_max_length": NaN}', "config.json: model_max_length is nan"),
        ('{"model_max_length": 0}', "config.json: model_max_length is 0"),
        ('{"padding_side": "middle"}', "padding_side: expected one of"),
        ('{"additional_special_tokens": "abc"}', "config.json: additional_special_tokens is 'abc'"),
        ('{"extra_special_tokens": 7}', "config.json: extra_special_tokens is 7"),
        ('{"extra_special_tokens": {"x": 7}}', "config.json: expected a token as a str"),
        (r'{"additional_special_tokens": ["\ud800"]}', "config.json: AddedToken: .* half a char"),
        (r'{"added_tokens_decoder": {"900": {"content": "\ud800"}}}', "half a character"),
        ("[" * 100_000, "config.json: not a JSON file"),
        ("[" * 101 + "]" * 101, "config.json: not a JSON file .nested more than 100 levels"),
        ('{"additional_special_tokens": [7]}', "expected a token as a str"),
        ('{"added_tokens_decoder": {"9": {"content": "<y>"}}}', "'<y>' has the id 9, but the next"),
        ('{"added_tokens_decoder": {"9": {"content": "<s>"}}}', "'<s>' has the id 9, but is 0"),
        ('{"added_tokens_decoder": {"x": {"content": "<s>"}}}', "added_tokens_decoder"),
        ('{"added_tokens_decoder": [1]}', "added_tokens_decoder is not an object"),
        ('{"added_tokens_decoder": {"9": {"lstrip": true}}}', "expected a token as a str"),
        ('{"add_prefix_space": false}', "add_prefix_space false is not supported"),
        ('{"mask_token": "[MASK]"}', r"mask_token: '\[MASK\]' is not in the vocabulary"),
        ('{"sp_model_kwargs": {"enable_sampling": true}}', "sp_model_kwargs"),
    ):
        config.write_text(text)
        with pytest.raises(ValueError, match=match):
            XLMRobertaTokenizer.from_pretrained(tmp_path)
    config.write_text('{"model_max_length": 1e30, "mask_token": {"content": "<mask>"}}')
    tokenizer = XLMRobertaTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer.encode("a" * 999)) == len(tokenizer.encode("a" * 999, truncation=True))
    with pytest.raises(ValueError, match="pass max_length"):
        tokenizer("a", padding="max_length")


def test_mask_swallows_the_space_where_the_model_keeps_spaces(tmp_path: Path) -> None:
    path = xlmr_vocabulary.write_tiny_vocabulary(tmp_path, remove_extra_whitespaces=False)
    tokenizer = XLMRobertaTokenizer(path)
    assert tokenizer.encode("fox \t ") != tokenizer.encode("fox")
    assert tokenizer.encode("fox \t <mask>") == tokenizer.encode("fox<mask>")
    assert tokenizer.encode("fox <pad>") != tokenizer.encode("fox<pad>")


def test_a_model_of_another_layout_is_refused(tmp_path: Path) -> None:
    xlmr_vocabulary.write_tiny_vocabulary(tmp_path, pad_id=0, unk_id=1, bos_id=2, eos_id=3)
    with pytest.raises(ValueError, match="not XLM-R's layout"):
        XLMRobertaTokenizer.from_pretrained(tmp_path)


def test_a_failed_save_leaves_the_old_files(
    tokenizer: XLMRobertaTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    tokenizer.model_max_length = 9

    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        tokenizer.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_older_tokenizer_json_is_told_of(
    tokenizer: XLMRobertaTokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with caplog.at_level(logging.WARNING, "xlmr_ext.tokenization"):
        tokenizer.save_pretrained(tmp_path)
    assert "tokenizer.json" in caplog.text


# -- tokenizer.json ------------------------------------------------------------------------------


@pytest.fixture
def rewrite(
    both_tiny: tuple[XLMRobertaTokenizer, Any], tmp_path: Path
) -> Callable[..., XLMRobertaTokenizer]:
    """Loads transformers' tokenizer.json after changing it."""
    both_tiny[1].save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    whole = json.loads(path.read_text("utf-8"))

    def load(change: Callable[[dict[str, Any]], object]) -> XLMRobertaTokenizer:
        data = json.loads(json.dumps(whole))
        change(data)
        path.write_text(json.dumps(data), "utf-8")
        return XLMRobertaTokenizer.from_pretrained(tmp_path)

    return load


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda d: d.update(model={"type": "BPE", "vocab": {}}), "expected .* Unigram model"),
        (lambda d: d["model"].update(unk_id=0), "unk_id 0"),
        (lambda d: d["model"].update(byte_fallback=True), "byte_fallback cannot be carried over"),
        (lambda d: d["model"]["vocab"].pop(1), "not in the order of XLM-R's ids"),
        (lambda d: d["model"]["vocab"].clear(), "not in the order of XLM-R's ids"),
        (lambda d: d.update(normalizer={"type": "Lowercase"}), "normalizer .*Lowercase.* cannot"),
        (
            lambda d: d.update(
                normalizer={"type": "Sequence", "normalizers": [d["normalizer"], {"type": "NFD"}]}
            ),
            "normalizer .*NFD.* cannot be carried over",
        ),
        (lambda d: d.update(pre_tokenizer={"type": "Whitespace"}), "pre_tokenizer .*Whitespace"),
        (lambda d: d.update(pre_tokenizer=None), "pre_tokenizer null"),
        (
            lambda d: d.update(
                pre_tokenizer={
                    "type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "never",
                }
            ),
            "pre_tokenizer .*never",
        ),
        (lambda d: d["added_tokens"].append({"id": 5}), "has no id or content"),
        (
            lambda d: d["added_tokens"].append({"id": 900, "content": "<far>"}),
            "'<far>' has the id 900, but the next free id is",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_carried_over_is_an_error(
    rewrite: Callable[..., XLMRobertaTokenizer], change: Any, match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        rewrite(change)


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (lambda d: d.update(post_processor=None), r"post_processor \(none\) is left behind"),
        (lambda d: d["post_processor"]["pair"].pop(), "another template"),
        (
            lambda d: d.update(truncation={"max_length": 9, "direction": "Right"}),
            "truncation settings are left behind",
        ),
        (lambda d: d.update(padding={"strategy": "BatchLongest"}), "padding settings"),
    ],
)
def test_what_is_left_behind_is_told(
    rewrite: Callable[..., XLMRobertaTokenizer],
    tokenizer: XLMRobertaTokenizer,
    caplog: pytest.LogCaptureFixture,
    change: Any,
    note: str,
) -> None:
    with caplog.at_level(logging.WARNING, "xlmr_ext.tokenizer.tokenizer_files"):
        loaded = rewrite(change)
    (record,) = caplog.records
    assert "tokenizer.json: " in record.getMessage()
    assert re.search(note, record.getMessage())
    assert loaded([FIRST, SECOND]) == tokenizer([FIRST, SECOND])


@pytest.mark.parametrize(
    "change",
    [
        lambda d: None,
        lambda d: d["post_processor"].update(
            {"type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["<s>", 0]}
        ),
        lambda d: d.update(
            normalizer={
                "type": "Sequence",
                "normalizers": [
                    d["normalizer"],
                    {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
                ],
            },
            pre_tokenizer={
                "type": "Metaspace", "replacement": "\u2581", "add_prefix_space": True,
            },
        ),
        lambda d: d["model"]["vocab"].pop() and None,
    ],
    ids=["as it is", "roberta", "older", "mask behind the vocabulary"],
)  # fmt: skip
def test_forms_of_one_tokenizer_json(
    rewrite: Callable[..., XLMRobertaTokenizer],
    tokenizer: XLMRobertaTokenizer,
    caplog: pytest.LogCaptureFixture,
    change: Any,
) -> None:
    loaded = rewrite(change)
    assert not caplog.records
    texts = [FIRST, SECOND, "a <mask> b", "ﬁx"]
    options = {"return_offsets_mapping": True}
    assert loaded(texts, **options) == tokenizer(texts, **options)
    assert loaded.get_vocab() == tokenizer.get_vocab()


def test_without_a_normalizer_nothing_is_normalized(
    rewrite: Callable[..., XLMRobertaTokenizer], tokenizer: XLMRobertaTokenizer
) -> None:
    plain = rewrite(lambda d: d.update(normalizer=None))
    assert plain.encode(FIRST) == tokenizer.encode(FIRST)
    assert plain.tokenize("ﬁ") == ["▁", "ﬁ"]
    assert tokenizer.tokenize("ﬁ") != plain.tokenize("ﬁ")


def test_what_is_no_object_is_refused(tmp_path: Path) -> None:
    for text in ("[]", "{", "3", '{"model": 3}', '{"model": {"type": "Unigram"}}', "\x00\xff"):
        (tmp_path / "tokenizer.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(ValueError, match=r"tokenizer\.json: "):
            XLMRobertaTokenizer.from_pretrained(tmp_path)


def nested(key: str, levels: int) -> Any:
    value: Any = None
    for _ in range(levels):
        value = {"type": "Sequence", key: [value]}
    return value


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda d: d["model"]["vocab"][7].__setitem__(1, 1e39), "vocab row 7 is .*1e.39"),
        (lambda d: d["model"]["vocab"][7].__setitem__(1, 10**400), "vocab row 7 is "),
        (lambda d: d["model"]["vocab"][7].__setitem__(1, float("nan")), "vocab row 7 is .*nan"),
        (lambda d: d["model"]["vocab"][7].__setitem__(0, "\ud800"), "row 7 .* half a character"),
        (lambda d: d["model"]["vocab"].__setitem__(7, ["", -1.0]), "not a sentencepiece model"),
        (
            lambda d: d["model"]["vocab"].__setitem__(7, d["model"]["vocab"][8]),
            "not a sentencepiece model .*already defined",
        ),
        (
            lambda d: d.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
            "not a sentencepiece model .*normalization rule",
        ),
        (lambda d: d.update(added_tokens=7), "added_tokens is int; expected a list"),
        (lambda d: d.update(added_tokens={"0": "<s>"}), "added_tokens is dict; expected a list"),
        (lambda d: d.update(added_tokens=[7]), "added token 7 .* has no id"),
        (lambda d: d.update(normalizer={"type": "Sequence", "normalizers": 3}), "normalizer 3 "),
        (lambda d: d.update(pre_tokenizer={"type": "Sequence", "pretokenizers": 3}), "tokenizer 3"),
        (
            lambda d: d.update(normalizer={"type": "Replace", "content": " ", "pattern": "x"}),
            "normalizer .*Replace.* cannot",
        ),
        (lambda d: d.update(normalizer=nested("normalizers", 90)), "nested more than 100 levels"),
    ],
)
def test_a_damaged_file_is_named(
    rewrite: Callable[..., XLMRobertaTokenizer], tmp_path: Path, change: Any, match: str
) -> None:
    for name in ("sentencepiece.bpe.model", "tokenizer_config.json"):
        (tmp_path / name).unlink(missing_ok=True)
    with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path))}/tokenizer\.json: .*{match}"):
        rewrite(change)


@pytest.mark.parametrize(
    ("tokens", "match"),
    [
        ("[" * 100_000, "added_tokens cannot be read"),
        ("[" * 101 + "]" * 101, "added_tokens cannot be read .nested"),
        ('[{"id": 1e999, "content": "<s>"}]', "has no id or content"),
        ('[{"id": 3.7, "content": "<s>"}]', "has no id or content"),
        ("[7]", "has no id or content"),
    ],
    ids=["deep", "nested", "infinite", "fraction", "number"],
)
def test_damaged_tokens_beside_a_vocabulary(
    tmp_path: Path, tiny_folder: Path, tokens: str, match: str
) -> None:
    shutil.copy(tiny_folder / "sentencepiece.bpe.model", tmp_path)
    (tmp_path / "tokenizer.json").write_text(f'{{"added_tokens": {tokens}}}')
    with pytest.raises(ValueError, match=rf"tokenizer\.json: .*{match}"):
        XLMRobertaTokenizer.from_pretrained(tmp_path)


def test_a_file_too_large_to_be_one(tmp_path: Path, tiny_folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(2**40)  # sparse
        with pytest.raises(ValueError, match=rf"{name}: 1099511627776 bytes is too large"):
            XLMRobertaTokenizer.from_pretrained(tmp_path)
        shutil.copy(tiny_folder / "sentencepiece.bpe.model", tmp_path)
        with pytest.raises(ValueError, match=rf"{name}: 1099511627776 bytes is too large"):
            XLMRobertaTokenizer.from_pretrained(tmp_path)
        for path in tmp_path.iterdir():
            path.unlink()


def test_arguments_of_transformers(tmp_path: Path, tiny_folder: Path) -> None:
    """They change nothing, choose the folder, or say what to do."""
    shutil.copytree(tiny_folder, tmp_path / "model/inner")
    tokenizer = XLMRobertaTokenizer.from_pretrained(
        tmp_path / "model",
        subfolder="inner",
        trust_remote_code=False,
        force_download=False,
        proxies=None,
        resume_download=True,
    )
    assert tokenizer.encode(FIRST) == XLMRobertaTokenizer.from_pretrained(tiny_folder).encode(FIRST)
    with pytest.raises(OSError, match="model"):
        XLMRobertaTokenizer.from_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="subfolder"):
        XLMRobertaTokenizer.from_pretrained(tmp_path / "model", subfolder="../model/inner")
    for name in ("proxies", "use_auth_token"):
        with pytest.raises(ValueError, match=f"{name} is not supported: "):
            XLMRobertaTokenizer.from_pretrained(tiny_folder, **{name: "x"})
    with pytest.raises(TypeError, match="nonsense"):
        XLMRobertaTokenizer.from_pretrained(tiny_folder, nonsense=1)


# -- added tokens in files -----------------------------------------------------------------------


def more_tokens(tokenizer: Any, kind: Any) -> None:
    tokenizer.add_tokens(["newword", kind("Präfix", normalized=False, lstrip=True)])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<ent>", "</ent>"]})


TEXTS = ["a newword b", "xnewwordy <ent> Präfix </ent> c", FIRST, "a <mask>"]


def test_added_tokens_are_kept_and_transformers_reads_them(
    tokenizer: XLMRobertaTokenizer, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    more_tokens(tokenizer, AddedToken)
    paths = tokenizer.save_pretrained(tmp_path)
    assert str(tmp_path / "added_tokens.json") in paths
    ids = json.loads((tmp_path / "added_tokens.json").read_text())
    assert ids == {
        token: tokenizer.vocab_size + index
        for index, token in enumerate(["newword", "Präfix", "<ent>", "</ent>"])
    }
    again = XLMRobertaTokenizer.from_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert again.added_tokens_decoder == tokenizer.added_tokens_decoder
    assert again.additional_special_tokens == ["<ent>", "</ent>"]
    expected = tokenizer(TEXTS, return_offsets_mapping=True)
    assert again(TEXTS, return_offsets_mapping=True) == expected
    assert dict(theirs(TEXTS, return_offsets_mapping=True)) == dict(expected)
    assert len(again) == len(theirs) == tokenizer.vocab_size + 4
    assert again.all_special_ids == theirs.all_special_ids

    # Saved again without them, no older file brings them back.
    fresh = XLMRobertaTokenizer(tmp_path / "sentencepiece.bpe.model")
    fresh.save_pretrained(tmp_path)
    assert len(XLMRobertaTokenizer.from_pretrained(tmp_path)) == fresh.vocab_size


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside the vocabulary"])
def test_added_tokens_that_transformers_saved(
    tokenizer: XLMRobertaTokenizer, tiny_folder: Path, tmp_path: Path, beside: bool
) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer.save_pretrained(tmp_path / "plain")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "plain")
    more_tokens(theirs, transformers.AddedToken)
    theirs.save_pretrained(tmp_path)
    if beside:
        model = (tiny_folder / "sentencepiece.bpe.model").read_bytes()
        (tmp_path / "sentencepiece.bpe.model").write_bytes(model)
    ours = XLMRobertaTokenizer.from_pretrained(tmp_path)
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.additional_special_tokens == ["<ent>", "</ent>"]
    for index, token in theirs.added_tokens_decoder.items():
        mine = ours.added_tokens_decoder[index]
        for name in ("content", "lstrip", "rstrip", "normalized", "special", "single_word"):
            assert getattr(mine, name) == getattr(token, name)
    assert ours(TEXTS)["input_ids"] == theirs(TEXTS)["input_ids"]


def test_old_files_of_added_tokens(tokenizer: XLMRobertaTokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    size = tokenizer.vocab_size
    (tmp_path / "added_tokens.json").write_text(f'{{"<b>": {size + 1}, "<a>": {size}}}')
    (tmp_path / "special_tokens_map.json").write_text(
        '{"additional_special_tokens": ["<a>"], "pad_token": {"content": "<pad>", "rstrip": true}}'
    )
    ours = XLMRobertaTokenizer.from_pretrained(tmp_path)
    assert ours.added_tokens_decoder[size] == AddedToken("<a>", special=True)
    assert ours.added_tokens_decoder[size + 1] == AddedToken("<b>")
    assert ours.added_tokens_decoder[1].rstrip
    assert ours.encode("<b><a>")[1:-1] == [size + 1, size]
    for text, match in (('{"<b>": "7"}', "expected a whole number"), ("7", "a JSON object")):
        (tmp_path / "added_tokens.json").write_text(text)
        with pytest.raises(ValueError, match=rf"added_tokens\.json.*{match}"):
            XLMRobertaTokenizer.from_pretrained(tmp_path)


def test_a_name_is_kept_and_settings_win(tiny_folder: Path) -> None:
    tokenizer = XLMRobertaTokenizer.from_pretrained(
        str(tiny_folder), use_fast=True, additional_special_tokens=["<z>"], padding_side=None
    )
    assert tokenizer.name_or_path == str(tiny_folder)
    assert tokenizer.additional_special_tokens_ids == [tokenizer.vocab_size]
