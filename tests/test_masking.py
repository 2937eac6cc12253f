"""The collator of a masked language model: what is drawn, hidden, labelled, and drawn again."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_heads import make_head
from xlmr_vocabulary import write_tiny_vocabulary

from xlmr_ext import XLMRobertaTokenizer
from xlmr_ext.tasks.masked import MaskingCollator


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> XLMRobertaTokenizer:
    return XLMRobertaTokenizer(write_tiny_vocabulary(tmp_path_factory.mktemp("vocabulary")))


def test_shares_are_the_recipes(tokenizer: XLMRobertaTokenizer) -> None:
    """Each within 5 standard deviations of a binomial."""
    collate = MaskingCollator(tokenizer, seed=1)
    ids = torch.full((200, 500), 40)
    masked, labels = collate.mask(ids)
    drawn = labels != -100

    def is_share(count: int, of: int, share: float) -> None:
        assert abs(count - of * share) < 5 * math.sqrt(of * share * (1 - share))

    total = int(drawn.sum())
    is_share(total, ids.numel(), 0.15)
    assert (labels[drawn] == 40).all()
    assert (masked[~drawn] == 40).all()
    hidden = masked[drawn] == tokenizer.mask_token_id
    is_share(int(hidden.sum()), total, 0.8)
    words = len(tokenizer) - len(set(tokenizer.all_special_ids))
    is_share(int((masked[drawn] == 40).sum()), total, 0.1 + 0.1 / words)
    others = masked[drawn][~hidden]
    assert set(others.tolist()).isdisjoint(tokenizer.all_special_ids)
    assert len(others.unique()) > words // 2


def test_special_tokens_and_padding_are_never_drawn(tokenizer: XLMRobertaTokenizer) -> None:
    collate = MaskingCollator(tokenizer, 1.0, pad_to_multiple_of=8, seed=1)
    texts = ["The quick brown fox", "a", f"Le {tokenizer.mask_token} chat"]
    rows = tokenizer(texts)["input_ids"]
    batch = collate([{"input_ids": row} for row in rows])
    assert batch["input_ids"].shape[1] % 8 == 0
    again = MaskingCollator(tokenizer, 1.0, pad_to_multiple_of=8, seed=1)(rows)
    special = set(tokenizer.all_special_ids)
    for index, row in enumerate(rows):
        labels = batch["labels"][index].tolist()
        assert labels[: len(row)] == [-100 if t in special else t for t in row]
        assert set(labels[len(row) :]) <= {-100}
        assert batch["attention_mask"][index].sum() == len(row)
        kept = [i for i, token in enumerate(row) if token in special]
        assert batch["input_ids"][index, kept].tolist() == [row[i] for i in kept]
    for name, tensor in batch.items():
        assert torch.equal(tensor, again[name])


def test_seeds(tokenizer: XLMRobertaTokenizer) -> None:
    ids = torch.randint(10, 60, (8, 32))
    first = MaskingCollator(tokenizer, seed=3)
    a, b = first.mask(ids), first.mask(ids)
    assert not torch.equal(a[0], b[0])
    second = MaskingCollator(tokenizer, seed=3)
    torch.rand(5)  # others' draws do not matter
    assert torch.equal(second.mask(ids)[0], a[0])
    state = second.generator.get_state()
    assert torch.equal(second.mask(ids)[0], b[0])
    second.generator.set_state(state)
    assert torch.equal(second.mask(ids)[0], b[0])
    torch.manual_seed(4)
    free = MaskingCollator(tokenizer).mask(ids)[0]
    torch.manual_seed(4)
    assert torch.equal(MaskingCollator(tokenizer).mask(ids)[0], free)


def test_a_batch_trains_a_model(tokenizer: XLMRobertaTokenizer) -> None:
    model = make_head(tokenizer, "XLMRobertaForMaskedLM", ["a", "b"]).train()
    collate = MaskingCollator(tokenizer, 0.5, seed=1)
    loss = model(**collate(tokenizer(["The quick brown fox", "Le chat"])["input_ids"])).loss
    loss.backward()
    assert loss.isfinite()
    assert model.lm_head.decoder.weight.grad.isfinite().all()


def test_bad_arguments(tokenizer: XLMRobertaTokenizer) -> None:
    for share in (0.0, 1.5, math.nan):
        with pytest.raises(ValueError, match="mlm_probability must be above 0"):
            MaskingCollator(tokenizer, share)
    for shares in ((0.8, 0.3), (-0.1, 0.1)):
        with pytest.raises(ValueError, match="mask_replace_prob and random_replace_prob must be"):
            MaskingCollator(tokenizer, mask_replace_prob=shares[0], random_replace_prob=shares[1])
    collate = MaskingCollator(tokenizer)
    with pytest.raises(ValueError, match="at least one text"):
        collate([])
    with pytest.raises(ValueError, match="token ids from 5 to 100000 came to be masked"):
        collate([[5, 100000]])
