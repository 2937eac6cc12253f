"""Batches for a masked language model: tokens drawn, hidden and labelled.

Devlin et al. 2019 (arXiv 1810.04805), section 3.1: of the tokens 15 % are drawn; of those 80 %
become ``<mask>``, 10 % any word, 10 % stay. Drawn anew for every batch, as Liu et al. 2019 (arXiv
1907.11692), section 4.1, have it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from xlmr_ext.losses import IGNORED

if TYPE_CHECKING:
    from xlmr_ext.tokenization import XLMRobertaTokenizer

__all__ = ["MaskingCollator"]


class MaskingCollator:
    """Makes a batch of tokenized texts, masked and labelled; a ``collate_fn`` of a DataLoader.

    Special tokens are never drawn, nor put in the place of a word. All random numbers come from one
    generator, so that a seed gives the same batches again, whatever else draws.

    Args:
        tokenizer: the model's.
        mlm_probability: share of the tokens that are drawn, above 0 and at most 1.
        mask_replace_prob, random_replace_prob: of those, the shares that become ``<mask>`` and
            another word; the rest stays as it is. Together at most 1.
        pad_to_multiple_of: rounds the length of a batch up.
        seed: of the generator; None: drawn from torch's.

    Raises:
        ValueError: a probability is out of range.
    """

    def __init__(
        self,
        tokenizer: XLMRobertaTokenizer,
        mlm_probability: float = 0.15,
        *,
        mask_replace_prob: float = 0.8,
        random_replace_prob: float = 0.1,
        pad_to_multiple_of: int | None = None,
        seed: int | None = None,
    ) -> None:
        if not 0.0 < mlm_probability <= 1.0:
            raise ValueError(
                f"mlm_probability must be above 0 and at most 1, got {mlm_probability}"
            )
        if min(mask_replace_prob, random_replace_prob) < 0.0 or (
            mask_replace_prob + random_replace_prob > 1.0
        ):
            raise ValueError(
                "mask_replace_prob and random_replace_prob must be at least 0 and at most 1 "
                f"together, got {mask_replace_prob} and {random_replace_prob}"
            )
        self.tokenizer = tokenizer
        self.mlm_probability = mlm_probability
        self.mask_replace_prob = mask_replace_prob
        self.random_replace_prob = random_replace_prob
        self.pad_to_multiple_of = pad_to_multiple_of
        # The state of a generator can be saved, so that a run goes on where it stopped.
        self.generator = torch.Generator()
        if seed is None:
            seed = int(torch.randint(2**63 - 1, ()))
        self.generator.manual_seed(seed)
        special = torch.tensor(sorted(tokenizer.all_special_ids))
        self._is_word = torch.ones(len(tokenizer), dtype=torch.bool)
        self._is_word[special] = False
        self._words = self._is_word.nonzero()[:, 0]

    def __call__(self, examples: Sequence[Mapping[str, Any] | Sequence[int]]) -> dict[str, Tensor]:
        """Pads, draws and labels.

        Args:
            examples: token ids of texts, special tokens included, or mappings that have them as
                ``input_ids``, as the tokenizer gives them.

        Returns:
            ``input_ids``, ``attention_mask`` and ``labels`` [B, S]; labels are the ids that were
            there at the places drawn, -100 elsewhere.

        Raises:
            ValueError: there are no examples, or an id is not the tokenizer's.
        """
        rows = [list(e["input_ids"] if isinstance(e, Mapping) else e) for e in examples]
        if not rows:
            raise ValueError("a batch to mask must hold at least one text")
        batch = self.tokenizer.pad(
            {"input_ids": rows}, pad_to_multiple_of=self.pad_to_multiple_of, return_tensors="pt"
        )
        ids, labels = self.mask(batch["input_ids"])
        return {"input_ids": ids, "attention_mask": batch["attention_mask"], "labels": labels}

    def mask(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Ids of any shape -> those with the drawn ones hidden, and the labels."""
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < len(self._is_word):
            raise ValueError(
                f"token ids from {int(ids.min())} to {int(ids.max())} came to be masked; the "
                f"tokenizer has 0 to {len(self._is_word) - 1}"
            )
        drawn = (self._uniform(ids) < self.mlm_probability) & self._is_word[ids]
        labels = ids.where(drawn, torch.tensor(IGNORED))
        kind = self._uniform(ids)
        any_word = self._words[torch.randint(len(self._words), ids.shape, generator=self.generator)]
        hidden = drawn & (kind < self.mask_replace_prob)
        other = drawn & ~hidden & (kind < self.mask_replace_prob + self.random_replace_prob)
        masked = ids.masked_fill(hidden, self.tokenizer.mask_token_id)
        return torch.where(other, any_word, masked), labels

    def _uniform(self, like: Tensor) -> Tensor:
        return torch.rand(like.shape, generator=self.generator)
