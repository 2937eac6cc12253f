"""Models with random parameters, their twins of transformers, and batches for both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from xlmr_ext import (
    PackedBatch,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
    XLMRobertaModel,
)

PAD = 1
SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 37,
    "max_position_embeddings": 40,
    "type_vocab_size": 2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "num_labels": 3,
}
M = TypeVar("M", bound=nn.Module)


def make_config(**overrides: Any) -> XLMRobertaConfig:
    """Small sizes, few of them multiples of a vector; no dropout."""
    return XLMRobertaConfig(**{**SIZES, **overrides})


def randomize(model: M, spread: float = 0.2) -> M:
    """Values everywhere, biases and LayerNorm included, so that no parameter is without effect."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if name.endswith("LayerNorm.weight") else 0.0, spread)
    return model


def make_classifier(**overrides: Any) -> XLMRobertaForSequenceClassification:
    """In eval mode."""
    return randomize(XLMRobertaForSequenceClassification(make_config(**overrides))).eval()


def make_encoder(**overrides: Any) -> XLMRobertaModel:
    """In eval mode, with a pooler."""
    return randomize(XLMRobertaModel(make_config(**overrides))).eval()


def twin(
    model: XLMRobertaModel | XLMRobertaForSequenceClassification, dtype: torch.dtype
) -> nn.Module:
    """The model of transformers with the same weights in ``dtype``; the same mode."""
    import transformers

    config = transformers.XLMRobertaConfig(
        **model.config.to_dict(), attn_implementation="eager", use_cache=False
    )
    theirs: nn.Module = getattr(transformers, type(model).__name__)(config)
    theirs.load_state_dict(model.state_dict())
    return theirs.to(dtype).train(model.training)


def random_ids(length: int, vocab_size: int = 61) -> Tensor:
    """[length] ids that are not padding, ``<s>`` first."""
    ids = torch.randint(3, vocab_size, (length,))
    ids[:1] = 0
    return ids


def pad_batch(texts: Sequence[Tensor], side: str = "right", room: int = 0) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask`` of the texts; ``room``: places beyond the longest."""
    length = max(len(text) for text in texts) + room
    ids = torch.full((len(texts), length), PAD)
    mask = torch.zeros(len(texts), length, dtype=torch.int64)
    for row, text in enumerate(texts):
        begin = 0 if side == "right" else length - len(text)
        ids[row, begin : begin + len(text)] = text
        mask[row, begin : begin + len(text)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def pack(texts: Sequence[Tensor]) -> PackedBatch:
    return PackedBatch.from_sequences([text.tolist() for text in texts])


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """By parameter; every one must have a gradient."""
    grads = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        grads[name] = parameter.grad
    return grads


def assert_parity(
    ours: Mapping[str, Tensor],
    oracle: Mapping[str, Tensor],
    theirs: Mapping[str, Tensor],
    factor: float,
    without_effect: tuple[str, ...] = (),
) -> None:
    """Our errors against the float64 oracle are at most ``factor`` times transformers' in float32.

    The rule of tolerance.py, for a whole model: the tensors share the rounding of everything before
    them, and one of few elements may by luck be hit almost exactly; so transformers' error counts
    as its largest relative error over all tensors.

    The gradient of a bias that shifts everything a softmax sees is 0: all that it has is rounding,
    of what the gradient of its weight sums as well. The keys' biases are such; ``without_effect``
    names others.
    """
    assert ours.keys() == oracle.keys() == theirs.keys()
    unit = torch.finfo(torch.float32).eps
    errors, scales = {}, {}
    for name, right in oracle.items():
        assert right.dtype == torch.float64, name
        assert theirs[name].dtype == ours[name].dtype == torch.float32, name
        assert ours[name].shape == right.shape, f"{name}: {ours[name].shape}, not {right.shape}"
        assert right.isfinite().all(), name
        assert ours[name].isfinite().all(), name
        errors[name] = (theirs[name].double() - right).abs().max().item()
        shifts = name.endswith(("key.bias", *without_effect))
        like = name.removesuffix("bias") + "weight" if shifts else name
        scales[name] = oracle[like].abs().max().item()
        assert scales[name] > 0, f"{name}: nothing to compare"
    relative = max(errors[name] / scales[name] for name in oracle)
    assert relative < 1e-4, "transformers' own float32 path is far off: no yardstick"
    for name, right in oracle.items():
        error = (ours[name].double() - right).abs().max().item()
        bound = (factor * relative + 4 * unit) * scales[name]
        assert error <= bound, (
            f"{name}: error {error:.3g}, bound {bound:.3g} (transformers' {errors[name]:.3g}, "
            f"largest value {scales[name]:.3g})"
        )
