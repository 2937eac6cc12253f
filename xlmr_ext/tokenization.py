"""XLM-R's tokenizer: the sentencepiece library, with fairseq's numbering of the pieces.

Ids: ``<s>`` 0, ``<pad>`` 1, ``</s>`` 2, ``<unk>`` 3; every other piece is its sentencepiece id plus
1; ``<mask>`` is the last id, 250001 in the published vocabulary (Conneau et al. 2020, and the
fairseq release of XLM-R). A text becomes ``<s> A </s>``, a pair ``<s> A </s></s> B </s>``.

Special tokens written in a text are taken as such, and white space around them is dropped;
``<mask>`` counts the space on its left as its own. A surrogate pair in a str is read as its
character; a lone surrogate, which no UTF-8 text can hold, is read as U+FFFD, which XLM-R's
normalization turns into a space. NUL is an unknown character.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xlmr_ext.files import replace_files
from xlmr_ext.loading import drop_arguments
from xlmr_ext.tokenizer.added_tokens import AddedToken
from xlmr_ext.tokenizer.batch_encoding import BatchEncoding
from xlmr_ext.tokenizer.origins import Origins
from xlmr_ext.tokenizer.padding import as_column, pad_examples, padded_widths, to_tensors
from xlmr_ext.tokenizer.pieces import Pieces
from xlmr_ext.tokenizer.ranges import IntArray, bounds, spread
from xlmr_ext.tokenizer.rows import truncate
from xlmr_ext.tokenizer.text_inputs import (
    choice,
    not_negative,
    positive,
    read_texts,
    require_str,
    strategy,
)
from xlmr_ext.tokenizer.token_vocabulary import TokenVocabulary
from xlmr_ext.tokenizer.tokenizer_files import (
    ADDED_FILE,
    TOKEN_NAMES,
    VOCABULARY_FILE,
    settings_files,
    tokenizer_files,
)

__all__ = ["AddedToken", "BatchEncoding", "XLMRobertaTokenizer"]

_log = logging.getLogger(__name__)

_SIDES = ("right", "left")
_PADDINGS = ("do_not_pad", "longest", "max_length")
_TRUNCATIONS = ("do_not_truncate", "longest_first", "only_first", "only_second")
_WINDOW = 4096  # texts that `encode_stream` holds at once


class XLMRobertaTokenizer(TokenVocabulary):
    """Text to XLM-R's token ids and back, with the arguments of transformers' tokenizers.

    Args:
        vocab_file: path of a ``sentencepiece.bpe.model``.
        bos_token, eos_token, ...: a token of the vocabulary each; ``<s>`` and ``</s>`` by default.
        additional_special_tokens: special tokens without a role; added where they are new.
        added_tokens_decoder: id to token (`AddedToken`, or a mapping as in the files) of the
            tokens that are found as they are written.
        model_max_length: tokens that the model takes, specials included.
        padding_side, truncation_side: "right" or "left".

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not a sentencepiece model in XLM-R's layout, a special token is
            not in the vocabulary, or an added token cannot have the id that it is given.
    """

    vocab_files_names = {"vocab_file": VOCABULARY_FILE}  # noqa: RUF012  (transformers' name)
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012
    is_fast = True  # as transformers' are that know where tokens come from

    def __init__(
        self,
        vocab_file: str | os.PathLike[str],
        *,
        bos_token: str | AddedToken = "<s>",
        eos_token: str | AddedToken = "</s>",
        unk_token: str | AddedToken = "<unk>",
        sep_token: str | AddedToken = "</s>",
        pad_token: str | AddedToken = "<pad>",
        cls_token: str | AddedToken = "<s>",
        mask_token: str | AddedToken = "<mask>",
        additional_special_tokens: Sequence[str | AddedToken] = (),
        added_tokens_decoder: Mapping[int, Any] | None = None,
        model_max_length: int = 512,
        padding_side: str = "right",
        truncation_side: str = "right",
    ) -> None:
        self.model_max_length = positive("model_max_length", model_max_length)
        self.padding_side = choice("padding_side", padding_side, _SIDES)
        self.truncation_side = choice("truncation_side", truncation_side, _SIDES)
        self.name_or_path = ""
        tokens = (bos_token, eos_token, unk_token, sep_token, pad_token, cls_token, mask_token)
        super().__init__(
            Pieces(vocab_file),
            dict(zip(TOKEN_NAMES, tokens, strict=True)),
            additional_special_tokens,
            added_tokens_decoder or {},
        )
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
        force_download: bool = False,
        subfolder: str = "",
        use_fast: bool = True,
        **settings: Any,
    ) -> XLMRobertaTokenizer:
        """Load a tokenizer from a directory, or from a model on the Hugging Face hub.

        Reads ``sentencepiece.bpe.model`` (or else ``tokenizer.json``) and, where they are there,
        ``tokenizer_config.json``, ``special_tokens_map.json`` and ``added_tokens.json``.
        ``settings`` are the constructor's arguments and win over the files'; one that is None is
        left to the files. ``use_fast`` changes nothing. The network is used for hub names only;
        ``cache_dir`` to ``force_download`` are as in huggingface_hub. ``subfolder`` is the folder
        within the model that the files lie in.

        Raises:
            OSError: no such directory or hub model, or it holds no vocabulary.
            ValueError: a file is damaged or asks for what this tokenizer does not do, or an
                argument asks for what is not done here.
        """
        given = {key: value for key, value in drop_arguments(settings).items() if value is not None}
        file, read = tokenizer_files(
            name_or_dir,
            cache_dir=cache_dir,
            revision=revision,
            token=token,
            local_files_only=local_files_only,
            force_download=force_download,
            subfolder=subfolder,
        )
        try:
            tokenizer = cls(file, **{**read, **given})
        except ValueError as error:
            raise ValueError(f"{os.fspath(name_or_dir)}: {error}") from error
        tokenizer.name_or_path = os.fspath(name_or_dir)
        return tokenizer

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> tuple[str, ...]:
        """Write the vocabulary and the settings into a directory; returns the files' paths.

        ``sentencepiece.bpe.model``, ``tokenizer_config.json``, ``special_tokens_map.json`` and,
        where tokens were added, ``added_tokens.json``, each whole or not at all; transformers loads
        them too. A ``tokenizer.json`` that lies there already is left, with a warning, as
        transformers would read it instead.
        """
        folder = Path(save_directory)
        if (folder / "tokenizer.json").exists():
            _log.warning("%s: an older tokenizer.json stays; transformers prefers it", folder)
        settings = {
            "model_max_length": self.model_max_length,
            "padding_side": self.padding_side,
            "truncation_side": self.truncation_side,
        }
        files = {
            VOCABULARY_FILE: self._pieces.serialized(),
            **settings_files(
                settings,
                self._special_tokens,
                self._additional,
                self._pieces.added,
                self.vocab_size,
            ),
        }
        if len(self) == self.vocab_size and not (folder / ADDED_FILE).exists():
            del files[ADDED_FILE]
        replace_files(
            folder, {name: functools.partial(_write, data) for name, data in files.items()}
        )
        return tuple(str(folder / name) for name in files)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(vocab_size={self.vocab_size}, "
            f"added={len(self) - self.vocab_size}, "
            f"model_max_length={self.model_max_length}, padding_side={self.padding_side!r})"
        )

    @property
    def max_len_single_sentence(self) -> int:
        """Tokens of one text that the model takes beside the special ones."""
        return self.model_max_length - self.num_special_tokens_to_add()

    @property
    def max_len_sentences_pair(self) -> int:
        """Tokens of a pair that the model takes beside the special ones."""
        return self.model_max_length - self.num_special_tokens_to_add(pair=True)

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
        stride: int = 0,
        is_split_into_words: bool = False,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        return_token_type_ids: bool | None = None,
        return_attention_mask: bool | None = None,
        return_overflowing_tokens: bool = False,
        return_special_tokens_mask: bool = False,
        return_offsets_mapping: bool = False,
        return_length: bool = False,
        split_special_tokens: bool = False,
        verbose: bool = True,
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
            stride: tokens that an overflowing row shares with the row before.
            is_split_into_words: every text is a list of words (str), as datasets of labelled words
                hold them. Each is tokenized by itself, and spans count from its beginning.
            pad_to_multiple_of: round the padded width up.
            padding_side: "right" or "left"; the tokenizer's where not given.
            return_tensors: None for lists of int, "pt" for torch tensors, "np" for arrays (int64).
            return_token_type_ids: add ``token_type_ids``, all 0 in XLM-R.
            return_overflowing_tokens: what is cut off becomes rows of its own, behind the row of
                its text; ``overflow_to_sample_mapping`` tells for each row which text it is of.
            return_special_tokens_mask: add ``special_tokens_mask``, 1 for the special tokens put
                around and for padding, 0 for what stands in a text.
            return_offsets_mapping: add ``offset_mapping``, for each token the (start, end) code
                points of the text given that it stands for, the space before a word not counted;
                (0, 0) for special tokens put around.
            return_length: add ``length``, the number of tokens of each row, padding not counted.
            split_special_tokens: read special tokens in a text as any other characters.
            verbose: log a warning where a text is longer than the model takes.

        Returns:
            ``input_ids`` and ``attention_mask`` (1 for a token, 0 for padding): [length] lists for
            one text, [rows, length] for a list or with overflowing rows, and always
            [rows, length] as tensors.

        Raises:
            TypeError: a text is not a str.
            ValueError: an unknown option; ``max_length`` below the number of special tokens; a
                text that "only_first" or "only_second" cannot make short enough; a stride that
                leaves no room for new tokens; rows of different lengths asked for as a tensor.
        """
        firsts, seconds, batched = read_texts(text, text_pair, words=is_split_into_words)
        padding = strategy("padding", padding, _PADDINGS)
        if truncation is None and max_length is not None and padding == "do_not_pad":
            truncation = True
        truncation = strategy("truncation", truncation, _TRUNCATIONS)
        side = choice("padding_side", padding_side or self.padding_side, _SIDES)
        kind = None if return_tensors is None else _tensor_kind(return_tensors)
        if pad_to_multiple_of is not None:
            positive("pad_to_multiple_of", pad_to_multiple_of)
        limit = self.model_max_length if max_length is None else positive("max_length", max_length)
        if max_length is not None and padding == "longest" and truncation == "do_not_truncate":
            self._warn_once(
                verbose,
                "ignored",
                "max_length is ignored with padding=True and no truncation; "
                'to pad to it, use padding="max_length"',
            )
        options = {"words": is_split_into_words, "split_specials": split_special_tokens}
        first = self._pieces.encode(firsts, **options)
        second = None if seconds is None else self._pieces.encode(seconds, **options)
        rows = truncate(
            first.ends,
            None if second is None else second.ends,
            specials=add_special_tokens,
            how=truncation,
            limit=limit,
            side=choice("truncation_side", self.truncation_side, _SIDES),
            stride=not_negative("stride", stride),
            overflow=return_overflowing_tokens,
        )
        lengths = rows.lengths
        longest = int(lengths.max(initial=0))
        if truncation == "do_not_truncate" and longest > self.model_max_length:
            self._warn_once(
                verbose,
                "too long",
                f"a text has {longest} tokens, more than the {self.model_max_length} that the "
                "model takes; pass truncation=True",
            )
        widths = padded_widths(lengths, padding, limit, pad_to_multiple_of)

        def padded(values: IntArray, fill: int) -> IntArray:
            return spread(values, lengths, widths, fill, side)

        ids = rows.fill(
            first.ids, None if second is None else second.ids, self.bos_token_id, self.eos_token_id
        )
        columns = {"input_ids": padded(ids, self.pad_token_id)}
        if return_token_type_ids:
            columns["token_type_ids"] = np.zeros(int(widths.sum()), np.int64)
        if return_attention_mask is not False:
            columns["attention_mask"] = padded(np.ones(len(ids), np.int64), 0)
        if return_special_tokens_mask:
            columns["special_tokens_mask"] = padded(rows.fill(0, 0, 1, 1), 1)
        origins = Origins(
            rows, first, second, widths, side, columns["input_ids"], self._pieces.name
        )
        if return_offsets_mapping:
            columns["offset_mapping"] = origins.all_spans()
        result = {name: as_column(name, flat, widths, kind) for name, flat in columns.items()}
        numbers = {}
        if return_length:
            numbers["length"] = lengths
        if return_overflowing_tokens:
            numbers["overflow_to_sample_mapping"] = rows.sample
        result.update(
            (name, to_tensors(name, values.tolist(), kind) if kind else values.tolist())
            for name, values in numbers.items()
        )
        if not batched and kind is None and not return_overflowing_tokens:
            result.update((name, result[name][0]) for name in columns)
        return BatchEncoding(result, origins)

    def encode(
        self,
        text: str,
        text_pair: str | None = None,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        stride: int = 0,
        return_tensors: str | None = None,
        **options: Any,
    ) -> Any:
        """The ids of one text or pair: ``tokenizer(text, ...)["input_ids"]``."""
        if not options.get("is_split_into_words"):
            require_str("text", text)
        return self(
            text,
            text_pair,
            add_special_tokens=add_special_tokens,
            padding=padding,
            truncation=truncation,
            max_length=max_length,
            stride=stride,
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
        pairs = None if text_pairs is None else list(text_pairs)
        return list(
            itertools.chain.from_iterable(
                self._encode_windows(list(texts), pairs, max_length, num_threads)
            )
        )

    def encode_stream(
        self,
        texts: Iterable[str],
        *,
        max_length: int | None = None,
        num_threads: int | None = None,
    ) -> Iterator[IntArray]:
        """As `encode_batch`, one text after another as they are asked for, in constant memory.

        Args:
            texts: an iterable of any length, of which some thousand texts are read ahead.
        """
        if isinstance(texts, str):
            raise TypeError("texts: expected an iterable of str, got a str")
        source = iter(texts)
        while window := list(itertools.islice(source, _WINDOW)):
            for rows in self._encode_windows(window, None, max_length, num_threads):
                yield from rows

    def _encode_windows(
        self,
        texts: list[str],
        pairs: list[str] | None,
        max_length: int | None,
        num_threads: int | None,
    ) -> Iterator[list[IntArray]]:
        """The rows of successive texts, some thousand at a time."""
        firsts, seconds, _ = read_texts(texts, pairs)
        limit = self.model_max_length if max_length is None else positive("max_length", max_length)
        if num_threads is not None:
            positive("num_threads", num_threads)
        for start in range(0, len(firsts), _WINDOW):
            window = slice(start, start + _WINDOW)
            first = self._pieces.encode(firsts[window], num_threads=num_threads)
            second = seconds and self._pieces.encode(seconds[window], num_threads=num_threads)
            rows = truncate(
                first.ends,
                second.ends if second else None,
                specials=True,
                how="longest_first",
                limit=limit,
                side=choice("truncation_side", self.truncation_side, _SIDES),
                stride=0,
                overflow=False,
            )
            ids = rows.fill(
                first.ids, second.ids if second else None, self.bos_token_id, self.eos_token_id
            )
            ends = bounds(rows.lengths).tolist()
            yield [ids[a:b] for a, b in itertools.pairwise(ends)]

    def tokenize(
        self, text: str, pair: str | None = None, add_special_tokens: bool = False
    ) -> list[str]:
        """The tokens of a text, as str; what the vocabulary lacks appears as it is written."""
        texts = [require_str("text", text), *([] if pair is None else [require_str("pair", pair)])]
        tokens, *second = (self._pieces.encode([one]).strings() for one in texts)
        if not add_special_tokens:
            return tokens + (second[0] if second else [])
        end = self.eos_token
        tail = [end, *second[0], end] if second else []
        return [self.bos_token, *tokens, end, *tail]

    # -- padding -------------------------------------------------------------------------------

    def pad(
        self,
        encoded_inputs: Any,
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
        verbose: bool = True,
    ) -> BatchEncoding:
        """Pad examples that were tokenized before: one, a batch, or a list of examples.

        Pads ``input_ids``, ``attention_mask`` (made where absent), ``token_type_ids`` and
        ``special_tokens_mask``; other columns, such as ``labels``, stay as they are. Examples of
        torch tensors or numpy arrays give such, unless ``return_tensors`` says otherwise.
        """
        kind = None if return_tensors is None else _tensor_kind(return_tensors)
        if pad_to_multiple_of is not None:
            positive("pad_to_multiple_of", pad_to_multiple_of)
        return BatchEncoding(
            pad_examples(
                encoded_inputs,
                padding=strategy("padding", padding, _PADDINGS),
                max_length=(
                    self.model_max_length
                    if max_length is None
                    else positive("max_length", max_length)
                ),
                multiple_of=pad_to_multiple_of,
                side=choice("padding_side", padding_side or self.padding_side, _SIDES),
                pad_id=self.pad_token_id,
                add_mask=return_attention_mask is not False,
                kind=kind,
            )
        )

    def _warn_once(self, verbose: bool, kind: str, message: str) -> None:
        if verbose and kind not in self._warned:
            self._warned.add(kind)
            _log.warning(message)


def _tensor_kind(value: Any) -> str:
    for name in ("tf", "jax", "mlx"):
        if value == name:
            raise ValueError(
                f"return_tensors: {name!r} is not supported; expected 'pt' for torch, 'np' for "
                "numpy, or None for lists, which other libraries convert"
            )
    return choice("return_tensors", value, ("pt", "np"))


def _write(data: bytes, path: Path) -> None:
    path.write_bytes(data)
