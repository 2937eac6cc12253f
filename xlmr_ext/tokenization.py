"""XLM-R's tokenizer: the sentencepiece library, with fairseq's numbering of the pieces.

Ids: ``<s>`` 0, ``<pad>`` 1, ``</s>`` 2, ``<unk>`` 3; every other piece is its sentencepiece id plus
1; ``<mask>`` is the last id, 250001 in the published vocabulary (Conneau et al. 2020, and the
fairseq release of XLM-R). A text becomes ``<s> A </s>``, a pair ``<s> A </s></s> B </s>``.

Special tokens written in a text are taken as such, and white space around them is dropped, so
``<mask>`` swallows the space on its left. A surrogate pair in a str is read as its character; a
lone surrogate, which no UTF-8 text can hold, is read as U+FFFD, which XLM-R's normalization turns
into a space. NUL is an unknown character.
"""

from __future__ import annotations

import functools
import json
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from xlmr_ext.batch_encoding import (
    BatchEncoding,
    IntArray,
    collect,
    finish,
    pad_rows,
    padded_width,
    to_tensors,
)
from xlmr_ext.files import replace_files
from xlmr_ext.pieces import Pieces, SpecialToken, SpecialTokenId
from xlmr_ext.text_inputs import (
    choice,
    positive,
    read_texts,
    refuse_later,
    require_str,
    strategy,
    truncated_lengths,
)
from xlmr_ext.tokenizer_files import (
    TOKEN_NAMES,
    VOCABULARY_FILE,
    read_settings,
    vocabulary_file,
)

__all__ = ["BatchEncoding", "XLMRobertaTokenizer"]

_log = logging.getLogger(__name__)

_SPACE = "\u2581"  # how sentencepiece writes a space
_SIDES = ("right", "left")
_PADDINGS = ("do_not_pad", "longest", "max_length")
_TRUNCATIONS = ("do_not_truncate", "longest_first", "only_first", "only_second")
_CLEAN_UP = (
    (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"),
    (" n't", "n't"), (" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"),
)  # fmt: skip


class XLMRobertaTokenizer:
    """Text to XLM-R's token ids and back, with the arguments of transformers' tokenizers.

    Args:
        vocab_file: path of a ``sentencepiece.bpe.model``.
        bos_token, eos_token, ...: a token of the vocabulary each; ``<s>`` and ``</s>`` by default.
        model_max_length: tokens that the model takes, specials included.
        padding_side, truncation_side: "right" or "left".

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not a sentencepiece model in XLM-R's layout, or a special token is
            not in the vocabulary.
    """

    vocab_files_names = {"vocab_file": VOCABULARY_FILE}  # noqa: RUF012  (transformers' name)
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    bos_token, eos_token, unk_token, sep_token = (
        SpecialToken(),
        SpecialToken(),
        SpecialToken(),
        SpecialToken(),
    )
    pad_token, cls_token, mask_token = SpecialToken(), SpecialToken(), SpecialToken()
    bos_token_id, eos_token_id, unk_token_id = SpecialTokenId(), SpecialTokenId(), SpecialTokenId()
    sep_token_id, pad_token_id, cls_token_id, mask_token_id = (
        SpecialTokenId(), SpecialTokenId(), SpecialTokenId(), SpecialTokenId(),
    )  # fmt: skip

    def __init__(
        self,
        vocab_file: str | os.PathLike[str],
        *,
        bos_token: str = "<s>",
        eos_token: str = "</s>",
        unk_token: str = "<unk>",
        sep_token: str = "</s>",
        pad_token: str = "<pad>",
        cls_token: str = "<s>",
        mask_token: str = "<mask>",
        model_max_length: int = 512,
        padding_side: str = "right",
        truncation_side: str = "right",
    ) -> None:
        self.model_max_length = positive("model_max_length", model_max_length)
        self.padding_side = choice("padding_side", padding_side, _SIDES)
        self.truncation_side = choice("truncation_side", truncation_side, _SIDES)
        self._pieces = Pieces(Path(vocab_file))
        tokens = (bos_token, eos_token, unk_token, sep_token, pad_token, cls_token, mask_token)
        self._special_tokens = dict(zip(TOKEN_NAMES, tokens, strict=True))
        for name, token in self._special_tokens.items():
            if require_str(name, token) not in self._pieces:
                raise ValueError(f"{name}: {token!r} is not in the vocabulary")
        self._pieces.set_specials(tokens)
        self._warned: set[str] = set()

    # -- files ---------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        name_or_dir: str | os.PathLike[str],
        *,
        cache_dir: str | os.PathLike[str] | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        **settings: Any,
    ) -> XLMRobertaTokenizer:
        """Load a tokenizer from a directory, or from a model on the Hugging Face hub.

        Reads ``sentencepiece.bpe.model`` (or else ``tokenizer.json``) and, where it is there,
        ``tokenizer_config.json``. ``settings`` are the constructor's arguments and win over the
        file's; one that is None is left to the file. The network is used for hub names only.

        Raises:
            OSError: no such directory or hub model, or it holds no vocabulary.
            ValueError: a file is damaged or asks for what this tokenizer does not do.
        """
        hub = {
            "cache_dir": cache_dir,
            "revision": revision,
            "token": token,
            "local_files_only": local_files_only,
        }
        with vocabulary_file(name_or_dir, **hub) as path:
            given = {key: value for key, value in settings.items() if value is not None}
            return cls(path, **{**read_settings(name_or_dir, **hub), **given})

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> tuple[str, ...]:
        """Write the vocabulary and the settings into a directory; returns the files' paths.

        ``sentencepiece.bpe.model``, ``tokenizer_config.json`` and ``special_tokens_map.json``, each
        whole or not at all; transformers loads them too. A ``tokenizer.json`` that lies there
        already is left, with a warning, as transformers would read it instead.
        """
        folder = Path(save_directory)
        if (folder / "tokenizer.json").exists():
            _log.warning("%s: an older tokenizer.json stays; transformers prefers it", folder)
        config = {
            "tokenizer_class": "XLMRobertaTokenizer",
            "model_max_length": self.model_max_length,
            "padding_side": self.padding_side,
            "truncation_side": self.truncation_side,
            "clean_up_tokenization_spaces": False,
            **self._special_tokens,
        }
        flags = {"lstrip": True, "normalized": False, "rstrip": False, "single_word": False}
        special = {**self._special_tokens, "mask_token": {"content": self.mask_token, **flags}}
        files = {
            VOCABULARY_FILE: self._pieces.serialized(),
            "tokenizer_config.json": json.dumps(config, indent=2).encode(),
            "special_tokens_map.json": json.dumps(special, indent=2).encode(),
        }
        replace_files(
            folder, {name: functools.partial(_write, data) for name, data in files.items()}
        )
        return tuple(str(folder / name) for name in files)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(vocab_size={self.vocab_size}, "
            f"model_max_length={self.model_max_length}, padding_side={self.padding_side!r})"
        )

    # -- vocabulary ----------------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        """Number of ids: sentencepiece's pieces, ``<pad>`` and ``<mask>``."""
        return self._pieces.size

    def __len__(self) -> int:
        return self.vocab_size

    def get_vocab(self) -> dict[str, int]:
        """Every token and its id."""
        return {piece: index for index, piece in enumerate(self._pieces.names())}

    @property
    def special_tokens_map(self) -> dict[str, str]:
        return dict(self._special_tokens)

    @property
    def all_special_tokens(self) -> list[str]:
        return list(dict.fromkeys(self._special_tokens.values()))

    @property
    def all_special_ids(self) -> list[int]:
        return [self._pieces.special_ids[token] for token in self.all_special_tokens]

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """2 around a text, 4 around a pair."""
        return 4 if pair else 2

    @overload
    def convert_tokens_to_ids(self, tokens: str) -> int: ...
    @overload
    def convert_tokens_to_ids(self, tokens: list[str] | tuple[str, ...]) -> list[int]: ...
    def convert_tokens_to_ids(self, tokens: str | list[str] | tuple[str, ...]) -> int | list[int]:
        """Ids of tokens; one that is not in the vocabulary has ``<unk>``'s."""
        if isinstance(tokens, str):
            return self._pieces.to_id(tokens)
        if not isinstance(tokens, (list, tuple)):
            raise TypeError(f"tokens: expected a str or a list, got {type(tokens).__name__}")
        for index, token in enumerate(tokens):
            require_str(f"tokens[{index}]", token)
        return list(map(self._pieces.to_id, tokens))

    @overload
    def convert_ids_to_tokens(self, ids: int, skip_special_tokens: bool = ...) -> str: ...
    @overload
    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = ...) -> list[str]: ...
    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> str | list[str]:
        """Tokens of ids (an int, or a list, array or tensor of them).

        Raises ValueError for an id outside the vocabulary.
        """
        array = np.asarray(ids)
        if array.ndim > 1:
            raise ValueError(f"ids: expected one row, got shape {array.shape}; see batch_decode")
        if array.size and array.dtype.kind not in "iu":
            raise TypeError(f"ids: expected integers, got {array.dtype}")
        outside = array[(array < 0) | (array >= self.vocab_size)]
        if outside.size:
            raise ValueError(f"ids: {outside.flat[0]} is not in 0..{self.vocab_size - 1}")
        pieces = self._pieces.names()
        if array.ndim == 0:
            return pieces[int(array)]
        if skip_special_tokens:
            array = array[~np.isin(array, list(self._pieces.special_ids.values()))]
        return list(map(pieces.__getitem__, array.tolist()))

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """Join tokens into text; the first token's space is the one that the tokenizer adds."""
        if not tokens:
            return ""
        rest = "".join(tokens[1:]).replace(_SPACE, " ")
        return tokens[0].replace(_SPACE, "") + rest

    # -- text to ids ---------------------------------------------------------------------------

    def __call__(
        self,
        text: Any,
        text_pair: Any = None,
        *,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        return_tensors: str | None = None,
        return_attention_mask: bool = True,
        return_token_type_ids: bool = False,
        pad_to_multiple_of: int | None = None,
        return_length: bool = False,
        **later: Any,
    ) -> BatchEncoding:
        """Tokenize a text, a list of texts, or pairs.

        Args:
            text: a str; a list (or tuple) of str; a list of (str, str) pairs; or a tuple of two
                lists, the first and the second texts of pairs.
            text_pair: the second text, or a list as long as ``text``. An empty one makes a pair
                too (transformers takes ``""`` beside a single text as none).
            add_special_tokens: put ``<s>`` and ``</s>`` around.
            padding: False ("do_not_pad"), True ("longest" of the batch) or "max_length".
            truncation: False ("do_not_truncate"), True ("longest_first": the longer of a pair is
                cut until both are as long, then both), "only_first" or "only_second". Not given,
                it is True where ``max_length`` is given without ``padding``, else False.
            max_length: tokens a row, specials included; ``model_max_length`` where not given.
            return_tensors: None for lists of int, "pt" for torch tensors, "np" for arrays (int64).
            return_token_type_ids: add ``token_type_ids``, all 0 in XLM-R.
            pad_to_multiple_of: round the padded width up.
            return_length: add ``length``, the number of tokens of each row, padding not counted.

        Returns:
            ``input_ids`` and ``attention_mask`` (1 for a token, 0 for padding): [length] lists for
            one text, [rows, length] for a list, and always [rows, length] as tensors.

        Raises:
            TypeError: a text is not a str.
            ValueError: an unknown option; ``max_length`` below the number of special tokens; a
                text that "only_first" or "only_second" cannot make short enough; rows of different
                lengths asked for as a tensor.
        """
        refuse_later(later)
        firsts, seconds, batched = read_texts(text, text_pair)
        padding = strategy("padding", padding, _PADDINGS)
        if truncation is None and max_length is not None and padding == "do_not_pad":
            truncation = True
        truncation = strategy("truncation", truncation, _TRUNCATIONS)
        if return_tensors is not None:
            choice("return_tensors", return_tensors, ("pt", "np"))
        if pad_to_multiple_of is not None:
            positive("pad_to_multiple_of", pad_to_multiple_of)
        limit = self.model_max_length if max_length is None else positive("max_length", max_length)
        if max_length is not None and padding == "longest" and truncation == "do_not_truncate":
            self._warn_once(
                "ignored",
                "max_length is ignored with padding=True and no truncation; "
                'to pad to it, use padding="max_length"',
            )
        rows = self._rows(firsts, seconds, add_special_tokens, truncation, limit, None)
        lengths = [len(row) for row in rows]
        longest = max(lengths, default=0)
        if truncation == "do_not_truncate" and longest > self.model_max_length:
            self._warn_once(
                "too long",
                f"a text has {longest} tokens, more than the {self.model_max_length} that the "
                "model takes; pass truncation=True",
            )
        columns: dict[str, Any] = {"input_ids": rows}
        if return_token_type_ids:
            columns["token_type_ids"] = [np.zeros(n, np.int64) for n in lengths]
        if return_attention_mask:
            columns["attention_mask"] = [np.ones(n, np.int64) for n in lengths]
        width = padded_width(lengths, padding, limit, pad_to_multiple_of)
        columns = self._pad_columns(columns, width, self.padding_side)
        batch = finish(columns, return_tensors, batched)
        if return_length:
            batch["length"] = (
                to_tensors("length", lengths, return_tensors) if return_tensors else lengths
            )
        return batch

    def encode(
        self,
        text: str,
        text_pair: str | None = None,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        return_tensors: str | None = None,
        **options: Any,
    ) -> Any:
        """The ids of one text or pair: ``tokenizer(text, ...)["input_ids"]``."""
        require_str("text", text)
        return self(
            text,
            text_pair,
            add_special_tokens=add_special_tokens,
            padding=padding,
            truncation=truncation,
            max_length=max_length,
            return_tensors=return_tensors,
            **options,
        )["input_ids"]

    def encode_batch(
        self,
        texts: Sequence[str],
        text_pairs: Sequence[str] | None = None,
        *,
        max_length: int | None = None,
        num_threads: int | None = None,
    ) -> list[IntArray]:
        """The ids of many texts, for training: specials added, cut to length, not padded.

        Args:
            max_length: tokens a row at most (longest first); ``model_max_length`` if not given.
            num_threads: threads of sentencepiece; by default torch's number where torch is
                loaded, else the processors that this process may use, fewer for small batches.

        Returns:
            One int64 array a text.
        """
        if isinstance(texts, str) or isinstance(text_pairs, str):
            raise TypeError("texts: expected lists of str, got a str")
        firsts, seconds, _ = read_texts(
            list(texts), None if text_pairs is None else list(text_pairs)
        )
        limit = self.model_max_length if max_length is None else positive("max_length", max_length)
        if num_threads is not None:
            positive("num_threads", num_threads)
        return self._rows(firsts, seconds, True, "longest_first", limit, num_threads)

    def tokenize(
        self, text: str, pair: str | None = None, add_special_tokens: bool = False
    ) -> list[str]:
        """The tokens of a text, as str; what the vocabulary lacks appears as it is written."""
        tokens = self._pieces.tokenize(require_str("text", text))
        second = None if pair is None else self.tokenize(pair)
        if not add_special_tokens:
            return tokens + (second or [])
        end = self.eos_token
        tail = [] if second is None else [end, *second, end]
        return [self.bos_token, *tokens, end, *tail]

    # -- ids to text ---------------------------------------------------------------------------

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool = False,
    ) -> str:
        """The text of one row of ids (a list, an array or a tensor).

        ``clean_up_tokenization_spaces`` takes the space before English punctuation away. Raises
        ValueError for an id outside the vocabulary.
        """
        ids = token_ids if np.ndim(token_ids) else [token_ids]
        text = self.convert_tokens_to_string(self.convert_ids_to_tokens(ids, skip_special_tokens))
        if clean_up_tokenization_spaces:
            for spaced, joined in _CLEAN_UP:
                text = text.replace(spaced, joined)
        return text

    def batch_decode(
        self,
        sequences: Iterable[Any],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool = False,
    ) -> list[str]:
        """`decode` of every row."""
        return [
            self.decode(row, skip_special_tokens, clean_up_tokenization_spaces) for row in sequences
        ]

    # -- padding -------------------------------------------------------------------------------

    def pad(
        self,
        encoded_inputs: Any,
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool = True,
        return_tensors: str | None = None,
    ) -> BatchEncoding:
        """Pad examples that were tokenized before: one, a batch, or a list of examples.

        Pads ``input_ids``, ``attention_mask`` (made where absent), ``token_type_ids`` and
        ``special_tokens_mask``; other columns, such as ``labels``, stay as they are.
        """
        columns, batched = collect(encoded_inputs)
        padding = strategy("padding", padding, _PADDINGS)
        side = choice("padding_side", padding_side or self.padding_side, _SIDES)
        if return_tensors is not None:
            choice("return_tensors", return_tensors, ("pt", "np"))
        if pad_to_multiple_of is not None:
            positive("pad_to_multiple_of", pad_to_multiple_of)
        limit = self.model_max_length if max_length is None else positive("max_length", max_length)
        for name in columns.keys() & self._fills().keys():
            columns[name] = [np.asarray(row, np.int64) for row in columns[name]]
        lengths = [len(row) for row in columns["input_ids"]]
        if return_attention_mask and "attention_mask" not in columns:
            columns["attention_mask"] = [np.ones(n, np.int64) for n in lengths]
        width = padded_width(lengths, padding, limit, pad_to_multiple_of)
        return finish(self._pad_columns(columns, width, side), return_tensors, batched)

    def _fills(self) -> dict[str, int]:
        return {
            "input_ids": self.pad_token_id,
            "attention_mask": 0,
            "token_type_ids": 0,
            "special_tokens_mask": 1,
        }

    def _pad_columns(self, columns: dict[str, Any], width: int, side: str) -> dict[str, Any]:
        if width > 1_000_000_000:
            raise ValueError(
                'padding="max_length": this tokenizer has no model_max_length; pass max_length'
            )
        fills = self._fills()
        return {
            name: pad_rows(rows, width, fills[name], side) if name in fills else rows
            for name, rows in columns.items()
        }

    # -- internal ------------------------------------------------------------------------------

    def _rows(
        self,
        firsts: list[str],
        seconds: list[str] | None,
        add_special_tokens: bool,
        truncation: str,
        limit: int,
        num_threads: int | None,
    ) -> list[IntArray]:
        extra = self.num_special_tokens_to_add(seconds is not None) if add_special_tokens else 0
        if truncation != "do_not_truncate":
            if truncation == "only_second" and seconds is None:
                raise ValueError('truncation="only_second": there is no second text')
            if limit < extra:
                raise ValueError(f"max_length: {limit} has no room for {extra} special tokens")
        ids = self._pieces.encode(firsts + (seconds or []), num_threads)
        first, second = ids[: len(firsts)], ids[len(firsts) :] if seconds is not None else None
        if truncation != "do_not_truncate":
            for index, row in enumerate(first):
                other = None if second is None else second[index]
                n, m = truncated_lengths(
                    len(row), None if other is None else len(other), limit - extra, truncation
                )
                first[index] = self._keep(row, n)
                if second is not None and other is not None:
                    second[index] = self._keep(other, m)
        if not add_special_tokens:
            return (
                first
                if second is None
                else list(map(np.concatenate, zip(first, second, strict=True)))
            )
        start, end = np.array([self.bos_token_id]), np.array([self.eos_token_id])
        if second is None:
            return [np.concatenate((start, row, end)) for row in first]
        return [
            np.concatenate((start, row, end, end, other, end))
            for row, other in zip(first, second, strict=True)
        ]

    def _keep(self, row: IntArray, count: int) -> IntArray:
        return row[:count] if self.truncation_side == "right" else row[len(row) - count :]

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            _log.warning(message)


def _write(data: bytes, path: Path) -> None:
    path.write_bytes(data)
