"""fairseq's checkpoints of XLM-R: ``model.pt``, ``dict.txt`` and ``sentencepiece.bpe.model``.

``model.pt`` is a dictionary with the entries of the model under ``model`` and its settings under
``args`` (a Namespace) or ``cfg`` (nested dictionaries). The entries' names changed: the first
release has ``decoder.sentence_encoder.emb_layer_norm``, the last
``encoder.sentence_encoder.layernorm_embedding``, and before the first, queries, keys and values
were one matrix ``in_proj``. :mod:`xlmr_ext.formats.fairseq_writer` goes the other way.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xlmr_ext.formats.dictionary import (
    PAD,
    read_dictionary,
    rows_of_words,
)
from xlmr_ext.formats.torch_file import read_torch_file
from xlmr_ext.tokenizer.pieces import Pieces

__all__ = [
    "ACTIVATIONS",
    "DICTIONARY_NAME",
    "LAYER",
    "LM_BIAS",
    "LM_HEAD",
    "LM_MATRIX",
    "MODEL_NAME",
    "NORM",
    "NORM_EPS",
    "PIECES_NAME",
    "POSITIONS",
    "TYPES",
    "WORDS",
    "FairseqModel",
    "listed",
    "read_fairseq",
]

MODEL_NAME = "model.pt"
DICTIONARY_NAME = "dict.txt"
PIECES_NAME = "sentencepiece.bpe.model"
NORM_EPS = 1e-5  # fairseq's LayerNorm knows no other

LAYER = {
    "self_attn.q_proj": "attention.self.query",
    "self_attn.k_proj": "attention.self.key",
    "self_attn.v_proj": "attention.self.value",
    "self_attn.out_proj": "attention.output.dense",
    "self_attn_layer_norm": "attention.output.LayerNorm",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
    "final_layer_norm": "output.LayerNorm",
}
_FUSED = ("query", "key", "value")  # the rows of in_proj, in this order
WORDS = "roberta.embeddings.word_embeddings.weight"
POSITIONS = "roberta.embeddings.position_embeddings.weight"
TYPES = "roberta.embeddings.token_type_embeddings.weight"
NORM = "roberta.embeddings.LayerNorm"
LM_MATRIX = "lm_head.weight"  # the word embeddings under another name
LM_BIAS = "lm_head.bias"
LM_HEAD = ("lm_head.dense", "lm_head.layer_norm")

_NAME = re.compile(r"(?:encoder|decoder)\.(sentence_encoder|lm_head)\.(.+)")
_LAYER_NAME = re.compile(r"layers\.(\d{1,3})\.(.+)\.(weight|bias)")
_FUSED_NAME = re.compile(r"layers\.(\d{1,3})\.self_attn\.in_proj_(weight|bias)")
_HEAD_NAME = re.compile(r"classification_heads\.([^.]+)\.((?:dense|out_proj)\.(?:weight|bias))")
_MAX_NAME = 200
_STATELESS = ("version", "embed_positions._float_tensor")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_accurate": "gelu_new",
    "gelu_fast": "gelu_new",
    "relu": "relu",
}


class FairseqModel(NamedTuple):
    """A checkpoint in Hugging Face's terms."""

    config: dict[str, Any]  # the content of config.json
    tensors: dict[str, Tensor]  # by the names of the class that config["architectures"] names
    notes: list[str]  # what was left out, a sentence each


def read_fairseq(source: str | Path, *, head: str | None = None) -> FairseqModel:
    """Reads ``model.pt`` and the ``dict.txt`` and ``sentencepiece.bpe.model`` beside it.

    Word rows are put in the order of XLM-R's tokenizer, which ``dict.txt`` mostly has already.
    Without a sentencepiece model they stay in the order of ``dict.txt``.

    Args:
        source: a folder, or a checkpoint file in one (``checkpoint_best.pt``).
        head: which of the classification heads to keep. None: the only one, and, where there is
            none, the head of the masked language model.

    Returns:
        :class:`FairseqModel`. Its tensors may be parts of the mapped file, which must not be cut
        short while they are used.

    Raises:
        OSError: a file is not there or cannot be read.
        ValueError: a file is not usable, or the choice of the head is open; the message names the
            file.
    """
    path = Path(source)
    if path.is_dir():
        path = path / MODEL_NAME
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    dictionary = path.parent / DICTIONARY_NAME
    if not dictionary.is_file():
        raise FileNotFoundError(
            f"{path.parent} has no {DICTIONARY_NAME}, which says what word a row is of"
        )
    words = read_dictionary(dictionary)
    checkpoint = read_torch_file(path, [argparse.Namespace])
    try:
        settings = _settings(checkpoint)
        entries = _entries(checkpoint)
        renamed, heads, unknown = _rename(entries)
        config = _config(settings, renamed)
        _check_shapes(config, renamed)
        notes = []
        if unknown:
            notes.append(f"left out, as XLM-R has no place for them: {listed(unknown)}")
        tensors = _choose_head(config, renamed, heads, head, notes)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    if len(words) != config["vocab_size"]:
        raise ValueError(
            f"{dictionary}: its lines and the special words (<mask> last) make {len(words)}; the "
            f"embedding in {path.name} has {config['vocab_size']} rows"
        )
    pieces = path.parent / PIECES_NAME
    if pieces.is_file():
        tokens = Pieces(pieces).names()
        _reorder(config, tensors, rows_of_words(dictionary, words, tokens))
        known = set(words)
        lost = [token for token in tokens if token not in known]
        if lost:
            notes.append(
                f"{len(lost)} pieces are not in {DICTIONARY_NAME}; they have the row of <unk>, as "
                f"in fairseq: {listed(lost)}"
            )
    else:
        notes.append(
            f"no {PIECES_NAME} beside it: the rows are in the order of {DICTIONARY_NAME}, and a "
            "tokenizer has to number its tokens likewise"
        )
    return FairseqModel(config, tensors, notes)


def _settings(checkpoint: Any) -> dict[str, Any]:
    """The model's settings, from whichever place holds them."""
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"no checkpoint of fairseq: it holds a {type(checkpoint).__name__}")
    found = checkpoint.get("args")
    if found is None:
        cfg = _as_mapping(checkpoint.get("cfg"))
        found = None if cfg is None else cfg.get("model")
    settings = _as_mapping(found)
    if settings is not None:
        # What decides about the model is plain; schedules and paths may be anything.
        return {
            str(name): value
            for name, value in settings.items()
            if value is None or isinstance(value, (str, int, float))
        }
    raise ValueError(
        "no checkpoint of fairseq: it has the settings neither under 'args' nor under "
        f"'cfg', 'model'; found: {listed(list(map(str, checkpoint)))}"
    )


def _as_mapping(value: Any) -> dict[str, Any] | None:
    if isinstance(value, argparse.Namespace):
        return vars(value)
    return dict(value) if isinstance(value, Mapping) else None


def _entries(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    entries = checkpoint.get("model")
    if not isinstance(entries, Mapping) or not entries:
        raise ValueError("no checkpoint of fairseq: it has no entries under 'model'")
    for name, tensor in entries.items():
        if not isinstance(name, str) or len(name) > _MAX_NAME or not isinstance(tensor, Tensor):
            raise ValueError(
                f"its entry {_short(name)} is a {type(tensor).__name__}; expected a tensor by name"
            )
    return dict(entries)


def _rename(
    entries: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]], list[str]]:
    """-> the encoder and language model head by Hugging Face's names, the heads, and the rest."""
    renamed: dict[str, Tensor] = {}
    heads: dict[str, dict[str, Tensor]] = {}
    unknown: list[str] = []
    for name, tensor in entries.items():
        in_head = _HEAD_NAME.fullmatch(name)
        if in_head is not None:
            heads.setdefault(in_head[1], {})[in_head[2]] = _floating(name, tensor)
            continue
        part = _NAME.fullmatch(name)
        if part is None:
            unknown.append(name)
            continue
        if part[2] in _STATELESS:
            continue
        for new, value in _renamed_entry(part[1], part[2], name, tensor).items():
            if new in renamed:
                raise ValueError(f"{name} is there twice, under an old name and a new one")
            renamed[new] = value
    return renamed, heads, unknown


def _renamed_entry(part: str, rest: str, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """An entry of the encoder (``part`` and ``rest`` of its name) by its new names."""
    tensor = _floating(name, tensor)
    owner, _, kind = rest.rpartition(".")
    is_pair = kind in ("weight", "bias")
    if part == "lm_head" and is_pair and owner in ("", "dense", "layer_norm"):
        return {f"lm_head.{rest}": tensor}
    if part == "lm_head":
        raise ValueError(f"{name} is no part of XLM-R's language model head")
    if rest in ("embed_tokens.weight", "embed_positions.weight"):
        return {WORDS if rest.startswith("embed_tokens") else POSITIONS: tensor}
    if is_pair and owner in ("emb_layer_norm", "layernorm_embedding"):
        return {f"{NORM}.{kind}": tensor}
    fused = _FUSED_NAME.fullmatch(rest)
    if fused is not None:
        if not tensor.dim() or tensor.shape[0] % 3:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, which is not three parts")
        return {
            f"roberta.encoder.layer.{int(fused[1])}.attention.self.{third}.{fused[2]}": rows
            for third, rows in zip(_FUSED, tensor.chunk(3), strict=True)
        }
    layer = _LAYER_NAME.fullmatch(rest)
    if layer is not None and layer[2] in LAYER:
        return {f"roberta.encoder.layer.{int(layer[1])}.{LAYER[layer[2]]}.{layer[3]}": tensor}
    if owner == "layer_norm":
        raise ValueError(
            f"{name} is of a pre-LayerNorm model (XLM-R XL and XXL), which xlmr_ext does not have"
        )
    raise ValueError(f"{name} is no part of XLM-R's encoder")


def _floating(name: str, tensor: Tensor) -> Tensor:
    if tensor.dtype not in _FLOATS:
        raise ValueError(f"{name} has type {tensor.dtype}, which is not of a weight")
    return tensor


def _config(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The configuration: sizes from the tensors, the rest from fairseq's settings."""
    for name, needed in (
        ("encoder_normalize_before", False),
        ("no_scale_embedding", True),
        ("encoder_learned_pos", True),
        ("spectral_norm_classification_head", False),
        ("adaptive_input", False),
    ):
        if bool(settings.get(name, needed)) is not needed:
            raise ValueError(f"{name} is {_short(settings[name])}; XLM-R has {needed}")
    if settings.get("encoder_layers_to_keep"):
        raise ValueError("encoder_layers_to_keep is set: pruned models are not read")
    activation = settings.get("activation_fn", "gelu")
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"activation_fn is {_short(activation)}; expected {', '.join(ACTIVATIONS)}"
        )
    layers = sorted({int(name.split(".")[3]) for name in tensors if ".encoder.layer." in name})
    if layers != list(range(len(layers))) or not layers:
        raise ValueError(
            f"its layers are numbered {layers[:20]}; expected 0, 1, 2, ... without a gap"
        )
    sizes = {
        name: tuple(tensors[name].shape) if name in tensors else ()
        for name in (WORDS, POSITIONS, "roberta.encoder.layer.0.intermediate.dense.weight")
    }
    for name, shape in sizes.items():
        if len(shape) != 2:
            raise ValueError(f"{name} has shape {list(shape)}; expected a matrix")
    (words, hidden), (positions, _), (inner, _) = sizes.values()
    for name, size in (
        ("encoder_layers", len(layers)),
        ("encoder_embed_dim", hidden),
        ("encoder_ffn_embed_dim", inner),
    ):
        if settings.get(name, size) != size:
            raise ValueError(f"{name} is {_short(settings[name])}, but the tensors have {size}")
    heads = settings.get("encoder_attention_heads")
    if not isinstance(heads, int) or isinstance(heads, bool) or heads < 1 or hidden % heads:
        raise ValueError(
            f"encoder_attention_heads is {_short(heads)}; expected a divisor of the {hidden} "
            "features"
        )
    return {
        "model_type": "xlm-roberta",
        "vocab_size": words,
        "hidden_size": hidden,
        "num_hidden_layers": len(layers),
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "hidden_act": ACTIVATIONS[activation],
        "hidden_dropout_prob": settings.get("dropout", 0.1),
        "attention_probs_dropout_prob": settings.get("attention_dropout", 0.1),
        "classifier_dropout": settings.get("pooler_dropout", 0.0),
        "max_position_embeddings": positions,
        "type_vocab_size": 1,
        "layer_norm_eps": NORM_EPS,
        "pad_token_id": PAD,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pooler_activation": settings.get("pooler_activation_fn", "tanh"),
    }


def _check_shapes(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Every entry of the encoder is there and fits the others."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    expected = {
        WORDS: (config["vocab_size"], hidden),
        POSITIONS: (config["max_position_embeddings"], hidden),
        f"{NORM}.weight": (hidden,),
        f"{NORM}.bias": (hidden,),
    }
    for layer in range(config["num_hidden_layers"]):
        for name in LAYER.values():
            shape = {
                "intermediate.dense": (inner, hidden),
                "output.dense": (hidden, inner),
            }.get(name, (hidden, hidden))
            full = f"roberta.encoder.layer.{layer}.{name}"
            is_norm = name.endswith("LayerNorm")
            expected[f"{full}.weight"] = (hidden,) if is_norm else shape
            expected[f"{full}.bias"] = (shape[0],)
    _check(expected, tensors)


def _check(expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor]) -> None:
    for name, shape in expected.items():
        there = tuple(tensors[name].shape) if name in tensors else None
        if there is None:
            raise ValueError(f"it lacks what becomes {name}")
        if there != shape:
            raise ValueError(f"what becomes {name} has shape {list(there)}; expected {list(shape)}")


def _choose_head(
    config: dict[str, Any],
    tensors: Mapping[str, Tensor],
    heads: Mapping[str, Mapping[str, Tensor]],
    head: str | None,
    notes: list[str],
) -> dict[str, Tensor]:
    """The tensors of the class that the head makes it; completes ``config`` and ``notes``."""
    activation = config.pop("pooler_activation")
    hidden, words = config["hidden_size"], config["vocab_size"]
    encoder = {name: tensor for name, tensor in tensors.items() if name.startswith("roberta.")}
    encoder[TYPES] = tensors[WORDS].new_zeros(1, hidden)
    language = {name: tensor for name, tensor in tensors.items() if name.startswith("lm_head.")}
    if head is None and len(heads) > 1:
        raise ValueError(f"it has several heads, choose one with head: {listed(sorted(heads))}")
    if head is not None and head not in heads:
        raise ValueError(f"it has no head {head!r}; its heads: {listed(sorted(heads)) or 'none'}")
    if heads:
        chosen = head if head is not None else next(iter(heads))
        if activation != "tanh":
            raise ValueError(f"pooler_activation_fn is {_short(activation)}; XLM-R's head has tanh")
        found = {f"classifier.{name}": tensor for name, tensor in heads[chosen].items()}
        matrix = found.get("classifier.out_proj.weight")
        labels = matrix.shape[0] if matrix is not None and matrix.dim() == 2 else 0
        _check(
            {
                "classifier.dense.weight": (hidden, hidden),
                "classifier.dense.bias": (hidden,),
                "classifier.out_proj.weight": (labels, hidden),
                "classifier.out_proj.bias": (labels,),
            },
            found,
        )
        config["architectures"] = ["XLMRobertaForSequenceClassification"]
        config["id2label"] = {str(index): f"LABEL_{index}" for index in range(labels)}
        config["label2id"] = {label: int(i) for i, label in config["id2label"].items()}
        others = sorted(set(heads) - {chosen})
        if others:
            notes.append(f"left out: the heads {listed(others)} (kept: {chosen})")
        if language:
            notes.append("left out: the head of the masked language model")
        return {**encoder, **found}
    if not language:
        config["architectures"] = ["XLMRobertaModel"]
        return encoder
    matrix = language.pop(LM_MATRIX, None)
    if matrix is not None and not _same(matrix, tensors[WORDS]):
        notes.append(
            "left out: the head of the masked language model, whose matrix is not that of the "
            "word embeddings"
        )
        config["architectures"] = ["XLMRobertaModel"]
        return encoder
    _check(
        {
            "lm_head.dense.weight": (hidden, hidden),
            "lm_head.dense.bias": (hidden,),
            "lm_head.layer_norm.weight": (hidden,),
            "lm_head.layer_norm.bias": (hidden,),
            LM_BIAS: (words,),
        },
        language,
    )
    config["architectures"] = ["XLMRobertaForMaskedLM"]
    if config["hidden_act"] != "gelu":
        notes.append(
            "transformers computes the head of the masked language model with erf GELU whatever "
            f"the configuration says; this one was trained with {config['hidden_act']}"
        )
    return {**encoder, **language}


def _reorder(config: dict[str, Any], tensors: dict[str, Tensor], rows: Sequence[int]) -> None:
    """Puts what has a row for every word into the order of the tokenizer."""
    if list(rows) == list(range(config["vocab_size"])):
        return
    config["vocab_size"] = len(rows)
    index = torch.tensor(rows)
    for name in (WORDS, LM_BIAS):
        if name in tensors:
            tensors[name] = tensors[name].index_select(0, index)


def _short(value: Any) -> str:
    # An integer of more than 4300 digits has no text.
    return repr(value)[:80] if not isinstance(value, int) or abs(value) < 2**63 else "a huge number"


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def listed(names: Sequence[str]) -> str:
    shown = ", ".join(name[:80] for name in names[:8])
    return shown + (f", and {len(names) - 8} more" if len(names) > 8 else "")
