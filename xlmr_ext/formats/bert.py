"""The BERT layout of models with XLM-R's vocabulary: multilingual MiniLM, multilingual E5 small.

Their ``config.json`` says ``model_type: "bert"``. BERT and XLM-R compute the same function of
differently laid out tables: BERT counts positions from 0 and XLM-R from 2, BERT adds one of two
token types and XLM-R its only one. So, for texts padded on the right (BERT also counts padding
on the left, XLM-R never does), a BERT checkpoint becomes an XLM-R one exactly:

* position row p becomes row p + 2; rows 0 and 1, which nothing reads, are zeros;
* token type row 0 is the one row, as XLM-R's tokenizer gives every token type 0;
* words are cut to the 250,002 that the tokenizer has (files have 250,037).

Everything here is a function of names, shapes and single tensors, so that a file is read entry by
entry. ``name`` always means a name that :func:`rename_bert` gave.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from reprlib import repr as short
from typing import Any

from torch import Tensor

__all__ = [
    "config_from_bert",
    "convert_bert_shape",
    "convert_bert_tensor",
    "is_bert_layout",
    "rename_bert",
]

WORDS = 250_002  # XLM-R's vocabulary
# A config that names no tokenizer is told by its number of words. Files round it up, and LaBSE
# (501,153) and mT5 (250,100 and more) have vocabularies of their own.
_VOCABULARY_SIZES = range(WORDS, 250_100)
_TOKENIZERS = ("XLMRobertaTokenizer", "XLMRobertaTokenizerFast")
_ANY_TOKENIZER = (None, "PreTrainedTokenizerFast", "TokenizersBackend")
_SHIFT = 2  # XLM-R's first position

_BASE = re.compile(r"^(bert\.)?(?=(embeddings|encoder|pooler)\.)")
_LM_HEAD = {
    "cls.predictions.transform.dense.": "lm_head.dense.",
    "cls.predictions.transform.LayerNorm.": "lm_head.layer_norm.",
    "cls.predictions.decoder.": "lm_head.decoder.",
    "cls.predictions.bias": "lm_head.bias",
}
_OLD_SUFFIXES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
_OF_WORDS = (
    "roberta.embeddings.word_embeddings.weight",
    "lm_head.bias",
    "lm_head.decoder.weight",
    "lm_head.decoder.bias",
)
_POSITIONS = "roberta.embeddings.position_embeddings.weight"
_TYPES = "roberta.embeddings.token_type_embeddings.weight"


def is_bert_layout(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is of a BERT with XLM-R's vocabulary.

    That is told by ``tokenizer_class`` and, where it says nothing, by ``vocab_size``.
    :func:`config_from_bert` has the sentence for a BERT with another one.
    """
    if config.get("model_type") != "bert":
        return False
    tokenizer = config.get("tokenizer_class")
    size = config.get("vocab_size")
    return tokenizer in _TOKENIZERS or (
        tokenizer in _ANY_TOKENIZER and isinstance(size, int) and size in _VOCABULARY_SIZES
    )


def config_from_bert(config: Mapping[str, Any]) -> dict[str, Any]:
    """The xlm-roberta configuration of a BERT's; labels and everything else is carried over.

    Raises:
        TypeError: a size is not an integer.
        ValueError: not a BERT with XLM-R's vocabulary, or its positions are not absolute ones.
    """
    if not is_bert_layout(config):
        raise ValueError(
            f"model_type {short(config.get('model_type'))} with vocab_size "
            f"{short(config.get('vocab_size'))} and tokenizer_class "
            f"{short(config.get('tokenizer_class'))} "
            "is not of XLM-R's vocabulary; of models in BERT's layout those with it are read "
            "(multilingual MiniLM, multilingual E5 small)"
        )
    kind = config.get("position_embedding_type", "absolute")
    if kind != "absolute":
        raise ValueError(f"position_embedding_type must be 'absolute', got {kind!r}")
    names = config.get("architectures")
    return {
        "layer_norm_eps": 1e-12,  # BERT's default; the other defaults are XLM-R's as well
        **config,
        "model_type": "xlm-roberta",
        "architectures": [re.sub("^Bert", "XLMRoberta", str(name)) for name in names]
        if isinstance(names, list)
        else None,
        "vocab_size": min(_integer(config, "vocab_size", WORDS), WORDS),
        "max_position_embeddings": _integer(config, "max_position_embeddings", 512) + _SHIFT,
        "type_vocab_size": 1,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
    }


def _integer(config: Mapping[str, Any], name: str, default: int) -> int:
    value = config.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    return value


def rename_bert(names: Collection[str], architecture: str | None = None) -> dict[str, str]:
    """XLM-R's name for each entry of a BERT checkpoint.

    BERT's classifier reads the pooler, tanh(dense), of the first token: what XLM-R's
    classification head does by itself. So a sequence classifier's pooler becomes
    ``classifier.dense`` and its matrix ``classifier.out_proj``; outside training (where XLM-R
    also drops out before the dense layer) both compute the same. The heads of token classification,
    question answering and multiple choice are the same in both. An entry that XLM-R has no place
    for (``cls.seq_relationship``) keeps its name.

    Args:
        names: the file's entries, with or without ``bert.`` in front.
        architecture: the class that the config names first. Other heads have a ``classifier`` too
            and may lie beside a pooler, which is none of theirs; None: a pooler and a
            ``classifier`` are taken for a sequence classifier.

    Raises:
        ValueError: two entries are the same one.
    """
    has_pooler = any(name.endswith("pooler.dense.weight") for name in names)
    is_sequence_classifier = (
        has_pooler
        and "classifier.weight" in names
        and (architecture is None or architecture.endswith("ForSequenceClassification"))
    )
    renamed: dict[str, str] = {}
    owner: dict[str, str] = {}
    for name in names:
        new = _BASE.sub("roberta.", name)
        for old, current in _OLD_SUFFIXES.items():
            new = new.replace(old, current)
        for old, current in _LM_HEAD.items():
            new = new.replace(old, current)
        if is_sequence_classifier:
            new = re.sub(r"^roberta\.pooler\.dense\.", "classifier.dense.", new)
            new = re.sub(r"^classifier\.(?=weight$|bias$)", "classifier.out_proj.", new)
        if new in owner:
            raise ValueError(f"{owner[new]} and {name} are both {new} of the model")
        owner[new] = name
        renamed[name] = new
    return renamed


def convert_bert_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that :func:`convert_bert_tensor` gives an entry of this shape."""
    if not shape:
        return shape
    rows, *rest = shape
    if name in _OF_WORDS:
        return (min(rows, WORDS), *rest)
    if name == _POSITIONS:
        return (rows + _SHIFT, *rest)
    if name == _TYPES:
        return (min(rows, 1), *rest)
    return shape


def convert_bert_tensor(name: str, tensor: Tensor) -> Tensor:
    """An entry's values in XLM-R's layout: a view of ``tensor`` except for the positions."""
    if name == _POSITIONS and tensor.dim():
        shifted = tensor.new_zeros(convert_bert_shape(name, tuple(tensor.shape)))
        shifted[_SHIFT:] = tensor
        return shifted
    if name in (*_OF_WORDS, _TYPES) and tensor.dim():
        return tensor[: convert_bert_shape(name, tuple(tensor.shape))[0]]
    return tensor
