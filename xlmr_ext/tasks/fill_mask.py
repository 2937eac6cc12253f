"""The words that fit in the place of ``<mask>``, by a masked language model.

Arguments, results and numbers are those of transformers' fill-mask pipeline.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

import torch

from xlmr_ext.data import check_vocabulary, encode
from xlmr_ext.prediction import (
    check_finite,
    check_max_length,
    in_eval_mode,
    packed_batches,
    single_texts,
    windows,
)

if TYPE_CHECKING:
    from xlmr_ext.masked_lm import XLMRobertaForMaskedLM
    from xlmr_ext.tokenization import XLMRobertaTokenizer

__all__ = ["FilledMask", "MaskFiller"]

# Scores over the whole vocabulary that are held at once: 64 MB of XLM-R's.
_MASKS = 64


class FilledMask(TypedDict):
    """A word for a mask: its probability, its id, what it reads as, and the text that has it."""

    score: float
    token: int
    token_str: str
    sequence: str


class MaskFiller:
    """Finds the most probable words for the ``<mask>`` of a text, or for each of several.

    >>> fill = MaskFiller(model, tokenizer)
    >>> fill("Paris is the <mask> of France.")[0]["token_str"]
    'capital'

    A word is a single token of the vocabulary, and each mask is filled by itself, with the others
    still masked.

    Args:
        model: a masked language model.
        tokenizer: the one that belongs to it.
        max_length: tokens a text is cut to; None: what the model takes, and a longer text is
            refused.

    Raises:
        ValueError: ``max_length`` is out of range.
    """

    def __init__(
        self,
        model: XLMRobertaForMaskedLM,
        tokenizer: XLMRobertaTokenizer,
        *,
        max_length: int | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.cuts = max_length is not None
        self.max_length = check_max_length(model, max_length)

    def __call__(
        self,
        texts: str | Iterable[str],
        *,
        top_k: int = 5,
        targets: str | Sequence[str] | None = None,
        batch_size: int = 32,
    ) -> Any:
        """Fills the masks of a text, or of each of several.

        Args:
            texts: one text, or several.
            top_k: number of words for each mask.
            targets: only these words; one that is no token stands for its first token, which a
                warning tells. Their probabilities are still those among all words.
            batch_size: most texts a batch.

        Returns:
            For a text with one mask a list of :class:`FilledMask`, the most probable first, for one
            with several a list of such lists; for several texts a list of these.

        Raises:
            TypeError: a text is not a str.
            ValueError: a text has no mask, or is too long; or an argument is out of range.
            ArithmeticError: where the model answers with NaN or infinity.
        """
        one = isinstance(texts, str)
        results = self.stream(
            [texts] if isinstance(texts, str) else texts,
            top_k=top_k,
            targets=targets,
            batch_size=batch_size,
        )
        return next(results) if one else list(results)

    def stream(
        self,
        texts: Iterable[str],
        *,
        top_k: int = 5,
        targets: str | Sequence[str] | None = None,
        batch_size: int = 32,
        window: int = 1024,
    ) -> Iterator[Any]:
        """The result of each text as they come, in order and in constant memory.

        Args:
            window: most texts that are read ahead.

        The other arguments and the errors are those of a call.
        """
        if isinstance(texts, str):
            raise TypeError("texts must be an iterable of str, got a str")
        for name, value in (("top_k", top_k), ("batch_size", batch_size), ("window", window)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        ids = None if targets is None else self.target_ids(targets)
        return self._stream(texts, top_k, ids, batch_size, window)

    def _stream(
        self,
        texts: Iterable[str],
        top_k: int,
        targets: list[int] | None,
        batch_size: int,
        window: int,
    ) -> Iterator[Any]:
        for rows in windows(single_texts(texts), window):
            group = [text for text, _ in rows]
            # One token more than there is room for tells that a text is too long.
            length = self.max_length if self.cuts else self.max_length + 1
            sequences = encode(self.tokenizer, group, None, max_length=length)
            check_vocabulary(sequences, self.model.config.vocab_size)
            for text, sequence in zip(group, sequences, strict=True):
                if len(sequence) > self.max_length:
                    raise ValueError(
                        f"the text {text[:40]!r} has more than the {self.max_length} tokens that "
                        "the model takes: give max_length to have it cut"
                    )
            self.check_masks(group, sequences)
            yield from self.fill(sequences, top_k, targets, batch_size)

    def check_masks(self, texts: Sequence[str], sequences: Sequence[Sequence[int]]) -> None:
        """ValueError for the first of the texts whose token ids have no mask."""
        mask = self.tokenizer.mask_token
        for text, sequence in zip(texts, sequences, strict=True):
            if self.tokenizer.mask_token_id not in sequence:
                where = f" within its first {len(sequence)} tokens" if mask in text else ""
                raise ValueError(f"the text {text[:40]!r} has no {mask}{where}")

    def target_ids(self, targets: str | Sequence[str]) -> list[int]:
        """The token ids of target words, see :meth:`__call__`."""
        words = [targets] if isinstance(targets, str) else list(targets)
        vocabulary = self.tokenizer.get_vocab()
        ids = set()
        for word in words:
            if not isinstance(word, str):
                raise TypeError(f"a target must be a str, got {type(word).__name__}")
            if word in vocabulary:
                ids.add(vocabulary[word])
                continue
            tokens = self.tokenizer(word, add_special_tokens=False)["input_ids"]
            if not tokens:
                warnings.warn(f"the target {word!r} is left out: it has no token", stacklevel=4)
                continue
            ids.add(tokens[0])
            token = self.tokenizer.convert_ids_to_tokens(tokens[0])
            warnings.warn(f"the target {word!r} is no token: {token!r} is taken", stacklevel=4)
        if not ids:
            raise ValueError("targets must hold at least one word that has a token")
        return sorted(ids)

    def fill(
        self,
        sequences: Sequence[list[int]],
        top_k: int,
        targets: Sequence[int] | None,
        batch_size: int,
    ) -> list[Any]:
        """The results of texts that are token ids already, each with a mask.

        Args:
            targets: token ids of :meth:`target_ids`; None: every word.
        """
        mask = self.tokenizer.mask_token_id
        found: dict[int, Any] = {}
        with in_eval_mode(self.model):
            for rows, batch in packed_batches(self.model, sequences, batch_size=batch_size):
                # The head runs at the masks alone.
                places = (batch.input_ids == mask).nonzero()[:, 0]
                states = self.model.roberta(packed=batch).last_hidden_state[places]
                best = [
                    words
                    for part in states.split(_MASKS)
                    for words in self._best(part, top_k, targets)
                ]
                for row in rows:
                    sequence = sequences[row]
                    count = sequence.count(mask)
                    found[row] = self._filled(sequence, best[:count])
                    del best[:count]
        return [found[row] for row in range(len(sequences))]

    def _best(
        self, states: torch.Tensor, top_k: int, targets: Sequence[int] | None
    ) -> list[list[tuple[float, int]]]:
        """The best words for each of the states [M, hidden], with their probabilities."""
        logits = self.model.lm_head(states).float()
        scores = logits.softmax(-1)
        check_finite(scores)
        if targets is not None:
            scores = scores[:, list(targets)]
        values, places = scores.topk(min(top_k, scores.shape[1]))
        tokens = places if targets is None else places.new_tensor(targets)[places]
        return [
            [*zip(*row, strict=True)] for row in zip(values.tolist(), tokens.tolist(), strict=True)
        ]

    def _filled(self, sequence: list[int], best: list[list[tuple[float, int]]]) -> Any:
        """The result of one text from the best words for each of its masks."""
        special = (self.tokenizer.mask_token_id, self.tokenizer.pad_token_id)
        places = [place for place, token in enumerate(sequence) if token == special[0]]
        results: list[list[FilledMask]] = []
        for place, words in zip(places, best, strict=True):
            results.append([])
            for score, token in words:
                tokens = [*sequence[:place], token, *sequence[place + 1 :]]
                tokens = [t for t in tokens if t != special[1]]
                results[-1].append(
                    {
                        "score": score,
                        "token": token,
                        "token_str": self.tokenizer.decode([token]),
                        # Masks that stay are special tokens too.
                        "sequence": self.tokenizer.decode(
                            tokens, skip_special_tokens=len(places) == 1
                        ),
                    }
                )
        return results[0] if len(places) == 1 else results
