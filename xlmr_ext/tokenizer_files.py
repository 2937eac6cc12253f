"""The files that a tokenizer is read from: its vocabulary and its settings."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from xlmr_ext.files import resolve_files

__all__ = ["read_settings", "vocabulary_file"]

VOCABULARY_FILE = "sentencepiece.bpe.model"
SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
TOKEN_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
# Other tokenizers ship a file of the same name and number its pieces in another way.
_TOKENIZER_CLASSES = (
    "XLMRobertaTokenizer",
    "XLMRobertaTokenizerFast",
    "PreTrainedTokenizerFast",
    "TokenizersBackend",
)


@contextlib.contextmanager
def vocabulary_file(name_or_dir: str | os.PathLike[str], **hub: Any) -> Iterator[Path]:
    """Give the path of a sentencepiece model, which may last only as long as the context.

    transformers 5 saves the vocabulary as ``tokenizer.json`` alone; it is converted. ``hub`` are
    the keyword arguments of `resolve_files`. Raises OSError where neither file is there, ValueError
    where ``tokenizer.json`` holds added tokens.
    """
    found = resolve_files(name_or_dir, (), optional=(VOCABULARY_FILE,), **hub)
    if found:
        yield found[VOCABULARY_FILE]
        return
    found = resolve_files(name_or_dir, (), optional=("tokenizer.json",), **hub)
    if not found:
        try:
            resolve_files(name_or_dir, (VOCABULARY_FILE,), **hub)
        except OSError as error:
            raise type(error)(f"{error}. Nor is there a tokenizer.json, which would do") from error
    path = found["tokenizer.json"]
    from xlmr_ext.vocabulary import write_sentencepiece_model

    added = [_text(token) for token in _read_json(path).get("added_tokens") or ()]
    _refuse_added(path, added)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / VOCABULARY_FILE
        write_sentencepiece_model(path, target)
        yield target


def read_settings(name_or_dir: str | os.PathLike[str], **hub: Any) -> dict[str, Any]:
    """The constructor's arguments that ``tokenizer_config.json`` gives; empty without the file.

    Raises ValueError where the file asks for what this tokenizer does not do: another tokenizer
    class, added tokens, sampling, no leading space.
    """
    found = resolve_files(name_or_dir, (), optional=("tokenizer_config.json",), **hub)
    if not found:
        return {}
    path = found["tokenizer_config.json"]
    config = _read_json(path)
    kind = config.get("tokenizer_class")
    if kind is not None and kind not in _TOKENIZER_CLASSES:
        raise ValueError(
            f"{path}: tokenizer_class is {kind!r}; expected one of {', '.join(_TOKENIZER_CLASSES)}"
        )
    if config.get("sp_model_kwargs"):
        raise ValueError(f"{path}: sp_model_kwargs {config['sp_model_kwargs']!r} is not supported")
    if config.get("add_prefix_space") is False:
        raise ValueError(f"{path}: add_prefix_space false is not supported")
    _refuse_added(path, [_text(t) for t in (config.get("added_tokens_decoder") or {}).values()])
    for key in ("additional_special_tokens", "extra_special_tokens"):
        tokens = config.get(key) or ()
        _refuse_added(
            path, [_text(t) for t in (tokens.values() if isinstance(tokens, Mapping) else tokens)]
        )
    settings: dict[str, Any] = {
        key: _text(config[key]) for key in TOKEN_NAMES if config.get(key) is not None
    }
    for key in ("padding_side", "truncation_side"):
        if config.get(key) is not None:
            settings[key] = config[key]
    longest = config.get("model_max_length")
    if longest is not None:
        # "No limit" is written as the float 1e30.
        if isinstance(longest, bool) or not isinstance(longest, (int, float)) or longest != longest:
            raise ValueError(f"{path}: model_max_length is {longest!r}; expected a number")
        settings["model_max_length"] = int(min(longest, 1e30))
    return settings


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file ({error})") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(data).__name__}")
    return data


def _text(token: Any) -> Any:
    return token.get("content") if isinstance(token, Mapping) else token


def _refuse_added(path: Path, tokens: list[Any]) -> None:
    unknown = [token for token in tokens if token not in SPECIAL_TOKENS]
    if unknown:
        raise ValueError(
            f"{path}: added tokens {unknown[:5]!r} are not in the XLM-R vocabulary; "
            "added tokens are not supported"
        )
