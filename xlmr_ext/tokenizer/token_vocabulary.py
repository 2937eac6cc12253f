"""The tokens of a tokenizer: their ids, the special and the added ones, and text of ids."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from xlmr_ext.refusals import TOKENIZERS
from xlmr_ext.tokenizer.added_tokens import AddedToken
from xlmr_ext.tokenizer.parts import SPACE
from xlmr_ext.tokenizer.pieces import Pieces
from xlmr_ext.tokenizer.text_inputs import require_str
from xlmr_ext.tokenizer.tokenizer_files import TOKEN_NAMES

__all__ = ["TokenVocabulary"]

_CLEAN_UP = (
    (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"),
    (" n't", "n't"), (" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"),
)  # fmt: skip


class _SpecialToken:
    """A special token by its role: ``pad_token``. Takes any token of the vocabulary."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type | None = None) -> str:
        return str(instance._special_tokens[self._name])

    def __set__(self, instance: TokenVocabulary, value: Any) -> None:
        instance._assign(self._name, value)


class _SpecialTokenId:
    """The id of a special token: ``pad_token_id``."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._token = name.removesuffix("_id")

    def __get__(self, instance: Any, owner: type | None = None) -> int:
        return int(instance._pieces.to_id(getattr(instance, self._token)))

    def __set__(self, instance: TokenVocabulary, value: int) -> None:
        setattr(instance, self._token, instance.convert_ids_to_tokens(value))


class TokenVocabulary:
    """Tokens and ids, without what makes them from texts."""

    bos_token, eos_token, unk_token, sep_token = (
        _SpecialToken(),
        _SpecialToken(),
        _SpecialToken(),
        _SpecialToken(),
    )
    pad_token, cls_token, mask_token = _SpecialToken(), _SpecialToken(), _SpecialToken()
    bos_token_id, eos_token_id, unk_token_id, sep_token_id = (
        _SpecialTokenId(), _SpecialTokenId(), _SpecialTokenId(), _SpecialTokenId(),
    )  # fmt: skip
    pad_token_id, cls_token_id, mask_token_id = (
        _SpecialTokenId(), _SpecialTokenId(), _SpecialTokenId(),
    )  # fmt: skip
    pad_token_type_id = 0

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            # Only for names that are not there.
            why = f": {TOKENIZERS[name]}" if name in TOKENIZERS else ""
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}{why}")

    def __init__(
        self,
        pieces: Pieces,
        special_tokens: Mapping[str, Any],
        additional: Sequence[Any],
        added: Mapping[int, Any],
    ) -> None:
        self._pieces = pieces
        self._special_tokens: dict[str, str] = {}
        for index, value in sorted((int(index), value) for index, value in added.items()):
            self._add_at(index, AddedToken.of(value))
        for name, value in special_tokens.items():
            self._assign(name, value)
        self._additional: list[str] = []
        self.additional_special_tokens = additional

    def _add_at(self, index: int, token: AddedToken) -> None:
        known = self._pieces.to_id(token.content)
        here = known if token.content in self._pieces else len(self._pieces)
        if index != here:
            raise ValueError(
                f"added_tokens_decoder: {token.content!r} has the id {index}, but "
                + ("is" if token.content in self._pieces else "the next free id is")
                + f" {here} in this vocabulary"
            )
        self._pieces.add(token)

    def _assign(self, name: str, value: Any) -> None:
        if not isinstance(value, (str, Mapping)) and not hasattr(value, "content"):
            raise TypeError(f"{name}: expected a str, got {type(value).__name__}")
        token = AddedToken.of(value, special=True)
        if token.content not in self._pieces:
            raise ValueError(
                f"{name}: {token.content!r} is not in the vocabulary (add_special_tokens adds it)"
            )
        if not isinstance(value, str) or not self._is_special(token.content):
            self._pieces.add(token)
        self._special_tokens[name] = token.content

    def _is_special(self, content: str) -> bool:
        return any(t.content == content and t.special for t in self._pieces.added.values())

    # -- the vocabulary --------------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        """Number of ids without added tokens: sentencepiece's pieces, ``<pad>`` and ``<mask>``."""
        return self._pieces.size

    def __len__(self) -> int:
        """Number of ids, those of added tokens included."""
        return len(self._pieces)

    def get_vocab(self) -> dict[str, int]:
        """Every token and its id."""
        return {self._pieces.name(index): index for index in range(len(self))}

    @property
    def vocab(self) -> dict[str, int]:
        return self.get_vocab()

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """The tokens that are found as they are written, by id; the special ones are among them."""
        return self._pieces.added

    @property
    def added_tokens_encoder(self) -> dict[str, int]:
        return {token.content: index for index, token in self._pieces.added.items()}

    def get_added_vocab(self) -> dict[str, int]:
        return self.added_tokens_encoder

    # -- special and added tokens ----------------------------------------------------------------

    @property
    def special_tokens_map(self) -> dict[str, str]:
        return dict(self._special_tokens)

    @property
    def all_special_tokens(self) -> list[str]:
        return list(dict.fromkeys((*self._special_tokens.values(), *self._additional)))

    @property
    def all_special_ids(self) -> list[int]:
        return list(map(self._pieces.to_id, self.all_special_tokens))

    @property
    def additional_special_tokens(self) -> list[str]:
        """Special tokens without a role; assigning a list adds those that are new."""
        return list(self._additional)

    @additional_special_tokens.setter
    def additional_special_tokens(self, tokens: Sequence[Any]) -> None:
        self.add_special_tokens({"additional_special_tokens": tokens})

    @property
    def additional_special_tokens_ids(self) -> list[int]:
        return list(map(self._pieces.to_id, self._additional))

    # transformers 5's names of the same.
    extra_special_tokens = additional_special_tokens
    extra_special_tokens_ids = additional_special_tokens_ids

    def add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        """Add tokens, which texts are searched for before sentencepiece reads what lies between.

        Args:
            new_tokens: a token or a list of them: str, or objects like `AddedToken`. One that has
                no id gets the next free one; the model's embeddings must be resized to match.
            special_tokens: make them special, so that decoding can leave them out.

        Returns:
            How many were not added before.
        """
        if not isinstance(new_tokens, (list, tuple)):
            new_tokens = [new_tokens]
        tokens = [AddedToken.of(t, special=True if special_tokens else None) for t in new_tokens]
        return sum(map(self._pieces.add, tokens))

    def add_special_tokens(
        self, special_tokens_dict: Mapping[str, Any], replace_extra_special_tokens: bool = True
    ) -> int:
        """Add special tokens by role.

        Args:
            special_tokens_dict: a token for ``bos_token``, ``eos_token``, ``unk_token``,
                ``sep_token``, ``pad_token``, ``cls_token`` or ``mask_token``, or a list for
                ``additional_special_tokens`` (also called ``extra_special_tokens``).
            replace_extra_special_tokens: the list takes the place of the one there was, which
                stays in the vocabulary.

        Returns:
            How many were not added before.
        """
        lists = ("additional_special_tokens", "extra_special_tokens")
        for key, value in special_tokens_dict.items():
            if key not in (*TOKEN_NAMES, *lists):
                raise ValueError(
                    f"special_tokens_dict: {key!r} is no role; expected one of "
                    f"{', '.join(TOKEN_NAMES)}, {lists[0]}"
                )
            if key in lists and not isinstance(value, (list, tuple)):
                raise TypeError(
                    f"special_tokens_dict: {key} must be a list, got {type(value).__name__}"
                )
        count = 0
        for key, value in special_tokens_dict.items():
            if key in lists:
                tokens = [AddedToken.of(item, special=True) for item in value]
                before = [] if replace_extra_special_tokens else self._additional
                self._additional = list(dict.fromkeys((*before, *map(str, tokens))))
                count += self.add_tokens(tokens)
            else:
                token = AddedToken.of(value, special=True)
                if not (isinstance(value, str) and self._is_special(value)):
                    count += self.add_tokens(token)
                self._special_tokens[key] = token.content
        return count

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """2 around a text, 4 around a pair."""
        return 4 if pair else 2

    def build_inputs_with_special_tokens(
        self, token_ids_0: Sequence[int], token_ids_1: Sequence[int] | None = None
    ) -> list[int]:
        """``<s> A </s>``, or ``<s> A </s></s> B </s>``."""
        start, end = self.bos_token_id, self.eos_token_id
        tail = [] if token_ids_1 is None else [end, *token_ids_1, end]
        return [start, *token_ids_0, end, *tail]

    def create_token_type_ids_from_sequences(
        self, token_ids_0: Sequence[int], token_ids_1: Sequence[int] | None = None
    ) -> list[int]:
        """Zeros: XLM-R has one token type."""
        return [0] * len(self.build_inputs_with_special_tokens(token_ids_0, token_ids_1))

    def get_special_tokens_mask(
        self,
        token_ids_0: Sequence[int],
        token_ids_1: Sequence[int] | None = None,
        already_has_special_tokens: bool = False,
    ) -> list[int]:
        """1 for a special token, 0 for another: of a whole row, or of one still to be built."""
        if already_has_special_tokens:
            if token_ids_1 is not None:
                raise ValueError("token_ids_1: a row that has its special tokens is one list")
            special = set(self.all_special_ids)
            return [int(index in special) for index in token_ids_0]
        tail = [] if token_ids_1 is None else [1, *[0] * len(token_ids_1), 1]
        return [1, *[0] * len(token_ids_0), 1, *tail]

    # -- tokens and ids --------------------------------------------------------------------------

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
        array = _row(ids)
        if array.ndim > 1:
            raise ValueError(f"ids: expected one row, got shape {array.shape}; see batch_decode")
        if array.size and array.dtype.kind not in "iu":
            raise TypeError(f"ids: expected integers, got {array.dtype}")
        outside = array[(array < 0) | (array >= len(self))]
        if outside.size:
            raise ValueError(f"ids: {outside.flat[0]} is not in 0..{len(self) - 1}")
        name = self._pieces.name
        if array.ndim == 0:
            return name(int(array))
        if skip_special_tokens:
            array = array[~np.isin(array, self.all_special_ids)]
        return list(map(name, array.tolist()))

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """Join tokens into text; the first token's space is the one that the tokenizer adds."""
        if not tokens:
            return ""
        rest = "".join(tokens[1:]).replace(SPACE, " ")
        return tokens[0].replace(SPACE, "") + rest

    @overload
    def decode(
        self,
        token_ids: int | Sequence[int],
        skip_special_tokens: bool = ...,
        clean_up_tokenization_spaces: bool = ...,
    ) -> str: ...
    @overload
    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = ...,
        clean_up_tokenization_spaces: bool = ...,
    ) -> Any: ...
    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool = False,
    ) -> str | list[str]:
        """The text of one row of ids (a list, an array or a tensor), or a list of those of several.

        ``clean_up_tokenization_spaces`` takes the space before English punctuation away. Raises
        ValueError for an id outside the vocabulary.
        """
        decode = self.batch_decode if _are_rows(token_ids) else self._decode_row
        return decode(token_ids, skip_special_tokens, clean_up_tokenization_spaces)

    def _decode_row(
        self, token_ids: Any, skip_special_tokens: bool, clean_up_tokenization_spaces: bool
    ) -> str:
        ids = np.atleast_1d(_row(token_ids))
        if skip_special_tokens:
            ids = ids[~np.isin(ids, [i for i, t in self._pieces.added.items() if t.special])]
        text = self.convert_tokens_to_string(self.convert_ids_to_tokens(ids))
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
            self._decode_row(row, skip_special_tokens, clean_up_tokenization_spaces)
            for row in sequences
        ]


def _are_rows(ids: Any) -> bool:
    if hasattr(ids, "ndim"):
        return bool(ids.ndim > 1)
    if not isinstance(ids, (list, tuple)) or not ids:
        return False
    return isinstance(ids[0], (list, tuple)) or getattr(ids[0], "ndim", 0) > 0


def _row(ids: Any) -> np.ndarray[Any, Any]:
    try:
        return np.asarray(ids)
    except ValueError:  # lists of different lengths, or a mixture
        raise ValueError("ids: expected one row of integers; see batch_decode") from None
