"""Blocks of several languages, drawn so that small languages are not drowned.

Language l is drawn with probability q_l = n_l^alpha / sum_k n_k^alpha, n_l being the number of its
blocks (Lample & Conneau 2019, arXiv 1901.07291, section 3.1; alpha 0.3 in Conneau et al. 2020,
arXiv 1911.02116, section 3).
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xlmr_ext.corpus.blocks import Block, Packer

if TYPE_CHECKING:
    from xlmr_ext.corpus.files import Corpus
    from xlmr_ext.tokenization import XLMRobertaTokenizer

__all__ = ["Mixture", "sampling_shares"]

TENSOR = "corpus.waiting"


def sampling_shares(sizes: Mapping[str, float], alpha: float) -> dict[str, float]:
    """The probability of each language, by its size."""
    powers = {language: size**alpha for language, size in sizes.items()}
    total = sum(powers.values())
    return {language: power / total for language, power in powers.items()}


class _Stream:
    """A language's blocks for ever: pass after pass over its files, whose order is another each
    time, and of the next ``shuffle`` blocks of a pass any.
    """

    def __init__(
        self,
        corpus: Corpus,
        language: str,
        tokenizer: XLMRobertaTokenizer,
        max_length: int,
        shuffle: int,
        seed: int,
    ) -> None:
        self._corpus, self._language, self._tokenizer = corpus, language, tokenizer
        self._max_length, self._shuffle, self._seed = max_length, shuffle, seed
        self.waiting: list[Block] = []
        self._pass = -1
        self._packer: Packer | None = None

    def draw(self, random: np.random.Generator) -> Block:
        self._fill()
        if not self.waiting:
            self._pass += 1
            self._begin(None)
            self._fill()
        if not self.waiting:
            files = self._corpus.of(self._language)
            raise ValueError(f"{self._corpus.where(files[0])}: its text has no tokens")
        chosen = int(random.integers(len(self.waiting)))
        self.waiting[chosen], self.waiting[-1] = self.waiting[-1], self.waiting[chosen]
        return self.waiting.pop()

    def state(self) -> dict[str, Any]:
        packer = None if self._packer is None else self._packer.state()
        blocks = [[len(block.ids), block.file, block.line] for block in self.waiting]
        return {"pass": self._pass, "packer": packer, "waiting": blocks}

    def restore(self, state: Mapping[str, Any], waiting: list[Block]) -> None:
        self.close()
        self._pass, self.waiting = state["pass"], waiting
        if state["packer"] is not None:
            self._begin(state["packer"])

    def close(self) -> None:
        if self._packer is not None:
            self._packer.close()
            self._packer = None

    def _begin(self, state: dict[str, Any] | None) -> None:
        """Begins a pass, or goes on in one."""
        random = np.random.default_rng(
            [self._seed, zlib.crc32(self._language.encode()), self._pass]
        )
        order = [int(n) for n in random.permutation(self._corpus.of(self._language))]
        self._packer = Packer(self._corpus, order, self._tokenizer, self._max_length, state)

    def _fill(self) -> None:
        """A pass is drawn to its last block before the next one begins."""
        while self._packer is not None and len(self.waiting) < self._shuffle:
            block = self._packer.next()
            if block is None:
                self.close()
            else:
                self.waiting.append(block)


class Mixture:
    """Draws blocks of a corpus, for ever and in constant memory.

    Args:
        sizes: of each language, as :func:`xlmr_ext.corpus.blocks.count_blocks` counts.
        shuffle: blocks of each language that are held, of which any is drawn next; at least 1.
    """

    def __init__(
        self,
        corpus: Corpus,
        sizes: Mapping[str, float],
        tokenizer: XLMRobertaTokenizer,
        *,
        max_length: int,
        alpha: float,
        shuffle: int,
        seed: int,
    ) -> None:
        self.shares = sampling_shares(sizes, alpha)
        self._streams = {
            language: _Stream(corpus, language, tokenizer, max_length, shuffle, seed)
            for language in self.shares
        }
        self._bounds: NDArray[np.float64] = np.cumsum([*self.shares.values()])
        self._random = np.random.default_rng([seed, 1])

    def draw(self, count: int) -> list[tuple[str, Block]]:
        """Blocks with their languages."""
        names = list(self._streams)
        found = []
        for value in self._random.random(count):
            # The last bound may be a rounding below 1.
            place = min(int(np.searchsorted(self._bounds, value, "right")), len(names) - 1)
            found.append((names[place], self._streams[names[place]].draw(self._random)))
        return found

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """All that :meth:`restore` needs to draw what would have been drawn: JSON, and the ids of
        the blocks that wait."""
        facts = {
            "random": self._random.bit_generator.state,
            "streams": {name: stream.state() for name, stream in self._streams.items()},
        }
        ids = [
            token
            for stream in self._streams.values()
            for block in stream.waiting
            for token in block.ids
        ]
        return facts, {TENSOR: torch.tensor(ids, dtype=torch.int32)}

    def restore(self, facts: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
        """Takes its own from the tensors."""
        self._random.bit_generator.state = facts["random"]
        ids = iter(tensors.pop(TENSOR).tolist())
        for name, stream in self._streams.items():
            state = facts["streams"][name]
            waiting = [
                Block(list(islice(ids, length)), file, line)
                for length, file, line in state["waiting"]
            ]
            stream.restore(state, waiting)

    def close(self) -> None:
        for stream in self._streams.values():
            stream.close()
