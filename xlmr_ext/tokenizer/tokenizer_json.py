"""What of a ``tokenizer.json`` can be carried over to sentencepiece, and what cannot."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xlmr_ext.json_files import read_json
from xlmr_ext.label_tables import short

__all__ = ["TokenizerJson", "added_by_id", "read_tokenizer_json"]


@dataclass(frozen=True)
class TokenizerJson:
    """What is taken from a file beside its vocabulary.

    Attributes:
        added: id to token, as the file writes it.
        notes: sentences on what is left behind without a change of a text's own ids.
    """

    added: dict[int, Any]
    notes: list[str]


def read_tokenizer_json(path: Path) -> TokenizerJson:
    """The added tokens, and notes on what is left behind.

    Raises ValueError that names the file where leaving something behind would change ids.
    """
    data = read_json(path, dict)
    for problem in (_normalizer(data.get("normalizer")), _pre_tokenizer(data.get("pre_tokenizer"))):
        if problem:
            raise ValueError(f"{path}: {problem} cannot be carried over to sentencepiece")
    model = data.get("model") or {}
    if isinstance(model, dict) and model.get("byte_fallback"):
        raise ValueError(f"{path}: byte_fallback cannot be carried over to sentencepiece")
    added = added_by_id(path, data.get("added_tokens"))
    notes = [
        note
        for note in (
            _post_processor(data.get("post_processor")),
            *(
                f"its {name} settings are left behind; give {name} with every call"
                for name in ("truncation", "padding")
                if data.get(name)
            ),
        )
        if note
    ]
    return TokenizerJson(added, notes)


def added_by_id(path: Path, tokens: Any) -> dict[int, Any]:
    """``added_tokens`` of a ``tokenizer.json`` by id; None is an empty list.

    Raises ValueError that names the file where it is no list of tokens.
    """
    if tokens is None:
        return {}
    if not isinstance(tokens, list):
        raise ValueError(f"{path}: added_tokens is {type(tokens).__name__}; expected a list")
    added = {}
    for token in tokens:
        index = token.get("id") if isinstance(token, Mapping) else None
        if isinstance(index, bool) or not isinstance(index, int) or "content" not in token:
            raise ValueError(f"{path}: added token {short(token)} has no id or content")
        added[index] = token
    return added


def _steps(value: Mapping[str, Any], key: str) -> list[Any]:
    """The steps of a sequence; what is no list is itself a step, and none that is known."""
    steps = value.get(key)
    return steps if isinstance(steps, list) else [] if steps is None else [steps]


def _normalizer(value: Any) -> str | None:
    """What of it is more than a compiled map and the care for white space that goes with it."""
    if value is None:
        return None
    kind = value.get("type") if isinstance(value, Mapping) else None
    if kind == "Sequence":
        steps = _steps(value, "normalizers")
        return next((problem for step in steps if (problem := _normalizer(step))), None)
    if kind in ("Precompiled", "Strip"):
        return None
    if kind == "Replace" and value.get("content") in (" ", "\u2581"):
        known = ({"Regex": " {2,}"}, {"Regex": r"\s+"}, {"String": " "})
        if value.get("pattern") in known:
            return None
    return f"the normalizer {json.dumps(value)[:80]}"


def _pre_tokenizer(value: Any) -> str | None:
    """What of it is more than words that begin with a space."""
    kind = value.get("type") if isinstance(value, Mapping) else None
    if kind == "Sequence":
        steps = _steps(value, "pretokenizers")
        return next((problem for step in steps if (problem := _pre_tokenizer(step))), None)
    if kind == "WhitespaceSplit":
        return None
    if kind == "Metaspace":
        prefix = value.get("prepend_scheme", "always" if value.get("add_prefix_space") else "never")
        if prefix in ("always", "first") and value.get("replacement") == "\u2581":
            return None
    return f"the pre_tokenizer {json.dumps(value)[:80]}"


def _post_processor(value: Any) -> str | None:
    kept = "special tokens are put around as XLM-R has them, <s> A </s> and <s> A </s></s> B </s>"
    if isinstance(value, Mapping) and value.get("type") == "RobertaProcessing":
        return None
    if isinstance(value, Mapping) and value.get("type") == "TemplateProcessing":
        single, pair = (_template(value.get(name)) for name in ("single", "pair"))
        if single == ["<s>", "A", "</s>"] and pair == ["<s>", "A", "</s>", "</s>", "B", "</s>"]:
            return None
        return f"another template of special tokens is left behind; {kept}"
    kind = value.get("type") if isinstance(value, Mapping) else "none"
    return f"its post_processor ({kind}) is left behind; {kept}"


def _template(steps: Any) -> list[Any]:
    """The ids of ``{"SpecialToken": {"id": ...}}`` and ``{"Sequence": {"id": ...}}``."""
    return [
        next((part.get("id") for part in step.values()), None)
        for step in (steps if isinstance(steps, list) else ())
        if isinstance(step, Mapping) and all(isinstance(part, Mapping) for part in step.values())
    ]
