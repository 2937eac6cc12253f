"""The files that a tokenizer is read from: its vocabulary, its settings, its added tokens."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xlmr_ext.files import pinned, resolve_files
from xlmr_ext.json_files import MAX_BYTES, check_nesting, read_json
from xlmr_ext.label_tables import short
from xlmr_ext.tokenizer.added_tokens import AddedToken
from xlmr_ext.tokenizer.tokenizer_json import added_by_id, read_tokenizer_json
from xlmr_ext.tokenizer.vocabulary import make_sentencepiece_model

__all__ = [
    "ADDED_FILE",
    "SPECIAL_TOKENS",
    "TOKEN_NAMES",
    "VOCABULARY_FILE",
    "settings_files",
    "tokenizer_files",
]

_log = logging.getLogger(__name__)

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
ADDED_FILE = "added_tokens.json"
_CONFIG, _SPECIAL_MAP = "tokenizer_config.json", "special_tokens_map.json"


def tokenizer_files(
    name_or_dir: str | os.PathLike[str], **hub: Any
) -> tuple[os.PathLike[str], dict[str, Any]]:
    """The sentencepiece model, for the constructor, and its other arguments that files hold.

    Where there is a ``tokenizer.json`` alone, as transformers 5 saves it, the model is made from
    it. ``hub`` are the keyword arguments of `resolve_files`.

    Raises:
        OSError: neither file is there.
        ValueError: a file is damaged, or asks for what this tokenizer does not do.
    """
    found = resolve_files(
        name_or_dir, (), optional=(VOCABULARY_FILE, _CONFIG, _SPECIAL_MAP, ADDED_FILE), **hub
    )
    for path in found.values():
        hub = pinned(hub, path)
    config = read_json(found[_CONFIG], dict) if _CONFIG in found else {}
    special = read_json(found[_SPECIAL_MAP], dict) if _SPECIAL_MAP in found else {}
    settings = {
        **_tokens(found.get(_SPECIAL_MAP), special),
        **_settings(found.get(_CONFIG), config),
    }
    # Of a hub model a large file is not fetched for the few tokens that it may add.
    json_file = None
    if VOCABULARY_FILE not in found or Path(name_or_dir).is_dir():
        others = resolve_files(name_or_dir, (), optional=("tokenizer.json",), **hub)
        json_file = others.get("tokenizer.json")
    decoder = config.get("added_tokens_decoder")
    if VOCABULARY_FILE in found:
        if decoder is None and json_file is not None:
            decoder = _added_at_its_head(json_file)
        elif decoder is None and ADDED_FILE in found:
            decoder = _old_added_tokens(found[ADDED_FILE], settings)
        settings["added_tokens_decoder"] = _by_id(found.get(_CONFIG), decoder or {})
        return found[VOCABULARY_FILE], settings
    if json_file is None:
        try:
            resolve_files(name_or_dir, (VOCABULARY_FILE,), **hub)
        except OSError as error:
            raise type(error)(f"{error}. Nor is there a tokenizer.json, which would do") from error
        raise FileNotFoundError(f"{name_or_dir}: no {VOCABULARY_FILE}")  # it came just now
    read = read_tokenizer_json(json_file)
    for note in read.notes:
        _log.warning("%s: %s", json_file, note)
    settings["added_tokens_decoder"] = {
        **_by_id(json_file, read.added),
        **_by_id(found.get(_CONFIG), decoder or {}),
    }
    return make_sentencepiece_model(json_file), settings


def settings_files(
    settings: Mapping[str, Any],
    special: Mapping[str, str],
    additional: list[str],
    added: Mapping[int, AddedToken],
    size: int,
) -> dict[str, bytes]:
    """The files beside the vocabulary, in the forms of transformers 4 and 5.

    Args:
        special: the special tokens by role; ``additional`` are those without one.
        added: the tokens that are found as they are written, by id; ``size`` ids are not added.
    """
    by_content = {token.content: token.to_dict() for token in added.values()}
    lists = {"additional_special_tokens": additional} if additional else {}
    config = {
        "tokenizer_class": "XLMRobertaTokenizer",
        "clean_up_tokenization_spaces": False,
        **settings,
        **special,
        **lists,
        "added_tokens_decoder": {str(index): token.to_dict() for index, token in added.items()},
    }
    roles = {
        name: {key: value for key, value in by_content[content].items() if key != "special"}
        for name, content in special.items()
    }
    beyond = {token.content: index for index, token in added.items() if index >= size}
    contents = {_CONFIG: config, _SPECIAL_MAP: {**roles, **lists}, ADDED_FILE: beyond}
    return {name: json.dumps(content, indent=2).encode() for name, content in contents.items()}


def _settings(path: Path | None, config: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor's arguments that ``tokenizer_config.json`` gives."""
    kind = config.get("tokenizer_class")
    if kind is not None and kind not in _TOKENIZER_CLASSES:
        raise ValueError(
            f"{path}: tokenizer_class is {kind!r}; expected one of {', '.join(_TOKENIZER_CLASSES)}"
        )
    if config.get("sp_model_kwargs"):
        raise ValueError(f"{path}: sp_model_kwargs {config['sp_model_kwargs']!r} is not supported")
    for key, only in (("add_prefix_space", True), ("split_special_tokens", False)):
        if config.get(key, only) not in (None, only):
            raise ValueError(f"{path}: {key} {json.dumps(config[key])} is not supported")
    if not isinstance(config.get("added_tokens_decoder", {}), dict):
        raise ValueError(f"{path}: added_tokens_decoder is not an object of ids")
    settings = _tokens(path, config)
    for key in ("padding_side", "truncation_side"):
        if config.get(key) is not None:
            settings[key] = config[key]
    longest = config.get("model_max_length")
    if longest is not None:
        # "No limit" is written as the float 1e30.
        is_number = isinstance(longest, (int, float)) and not isinstance(longest, bool)
        if not is_number or not longest >= 1:
            raise ValueError(
                f"{path}: model_max_length is {short(longest)}; expected a number of at least 1"
            )
        settings["model_max_length"] = int(min(longest, 1e30))
    return settings


def _tokens(path: Path | None, config: Mapping[str, Any]) -> dict[str, Any]:
    """The special tokens that a file names."""
    tokens: dict[str, Any] = {
        key: _token(path, config[key]) for key in TOKEN_NAMES if config.get(key) is not None
    }
    for key in ("extra_special_tokens", "additional_special_tokens"):
        extra = config.get(key)
        if extra:
            values = list(extra.values()) if isinstance(extra, Mapping) else extra
            if not isinstance(values, list):
                raise ValueError(f"{path}: {key} is {short(extra)}; expected a list of tokens")
            tokens["additional_special_tokens"] = [_token(path, value) for value in values]
    return tokens


def _by_id(path: Path | None, tokens: Mapping[Any, Any]) -> dict[int, AddedToken | str]:
    try:
        return {int(index): _token(path, token) for index, token in tokens.items()}
    except ValueError as error:
        raise ValueError(f"{path}: added_tokens_decoder: {error}") from error


def _token(path: Path | None, value: Any) -> AddedToken | str:
    """A str is left one: it says nothing of how it is found."""
    try:
        token = AddedToken.of(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    return value if isinstance(value, str) else token


def _added_at_its_head(path: Path) -> dict[int, Any]:
    """``added_tokens`` of a tokenizer.json; they come before its long vocabulary."""
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(
            f"{path}: {size} bytes is too large for a tokenizer.json; at most {MAX_BYTES}"
        )
    text = path.read_bytes().decode("utf-8", "replace")
    begin = re.search(r'"added_tokens"\s*:\s*(?=\[)', text)
    if begin is None:
        return {}
    try:
        tokens, _ = json.JSONDecoder().raw_decode(text, begin.end())
        check_nesting(tokens)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: added_tokens cannot be read ({error})") from None
    return added_by_id(path, tokens)


def _old_added_tokens(path: Path, settings: Mapping[str, Any]) -> dict[int, Any]:
    """Tokens of ``added_tokens.json``, which tells the ids alone."""
    special = {*SPECIAL_TOKENS, *map(str, settings.get("additional_special_tokens", ()))}
    added = {}
    for content, index in read_json(path, dict).items():
        if isinstance(index, bool) or not isinstance(index, int):
            raise ValueError(f"{path}: {content!r} has the id {index!r}; expected a whole number")
        added[index] = {"content": content, "special": content in special}
    return added
