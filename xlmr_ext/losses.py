"""Losses of the heads, with their labels checked; reduction and conventions as in torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100  # torch's mark for a label that does not count


def classification_loss(
    logits: Tensor,
    labels: Tensor,
    problem_type: str | None,
    num_items: Tensor | int | None = None,
) -> Tensor:
    """Mean loss of logits [B, L], or their sum divided by ``num_items``.

    Args:
        labels: [B] class indices (or :data:`IGNORED`) for ``single_label_classification``; [B, L]
            of 0 and 1 for ``multi_label_classification``; [B, L] numbers, or [B] where L is 1, for
            ``regression``.
        problem_type: None tells it from L and the labels' type, as transformers does.

    Raises:
        TypeError, ValueError: labels of another type, shape, device or range.
    """
    _on_device(logits.device, "labels", labels)
    problem = problem_type or _problem_type(logits.shape[1], labels)
    if problem == "single_label_classification":
        return cross_entropy(logits, labels, num_items)
    # With one output, [B] and [B, 1] are the same.
    if labels.shape != logits.shape and not (
        logits.shape[1] == 1 and labels.numel() == logits.numel()
    ):
        raise ValueError(
            f"labels have shape {list(labels.shape)}; expected {list(logits.shape)} for {problem}"
        )
    targets = labels.reshape(logits.shape).to(logits.dtype)
    if problem == "regression":
        return _reduced(F.mse_loss(logits, targets, reduction=_reduction(num_items)), num_items)
    loss = F.binary_cross_entropy_with_logits(logits, targets, reduction=_reduction(num_items))
    return _reduced(loss, num_items)


def cross_entropy(logits: Tensor, labels: Tensor, num_items: Tensor | int | None = None) -> Tensor:
    """Mean over the labels that count of -log softmax(logits)[label], or the sum divided by
    ``num_items``.

    Args:
        logits: [..., L].
        labels: as many as there are rows of logits: whole numbers in [0, L), or :data:`IGNORED`.
    """
    classes = logits.shape[-1]
    targets = check_classes(labels, logits.shape[:-1], classes, logits.device)
    loss = F.cross_entropy(logits.reshape(-1, classes), targets, reduction=_reduction(num_items))
    return _reduced(loss, num_items)


def check_classes(
    labels: Tensor, shape: Sequence[int], classes: int, device: torch.device
) -> Tensor:
    """The labels as int64 in one dimension, checked.

    Args:
        labels: whole numbers in [0, classes), or :data:`IGNORED`; as many as ``shape`` has places.

    Raises:
        TypeError, ValueError: labels of another type, number, device or range.
    """
    _on_device(device, "labels", labels)
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"labels are {labels.dtype}; expected class indices (torch.int64)")
    targets = labels.reshape(-1)
    if targets.shape[0] != math.prod(shape):
        raise ValueError(f"labels have shape {list(labels.shape)}; expected {list(shape)}")
    if not torch.compiler.is_compiling():
        found = targets[targets != IGNORED]
        if found.numel():
            low, high = (int(x) for x in torch.aminmax(found))
            if low < 0 or high >= classes:
                raise ValueError(
                    f"labels hold {low if low < 0 else high}; expected 0 to {classes - 1}, "
                    f"or {IGNORED}"
                )
    return targets.long()


def counted(targets: Tensor) -> Tensor:
    """The places of the labels that count, of :func:`check_classes`."""
    return (targets != IGNORED).nonzero()[:, 0]


def span_loss(
    start_logits: Tensor, end_logits: Tensor, start_positions: Tensor, end_positions: Tensor
) -> Tensor:
    """Mean of the cross entropies of an answer's first and last token.

    Args:
        start_logits, end_logits: [B, S].
        start_positions, end_positions: [B] or [B, 1] whole numbers; one of S or more (the answer
            lies in a part that was cut off) does not count.
    """
    return (
        _position_loss("start_positions", start_logits, start_positions)
        + _position_loss("end_positions", end_logits, end_positions)
    ) / 2


def _position_loss(name: str, logits: Tensor, positions: Tensor) -> Tensor:
    _on_device(logits.device, name, positions)
    if positions.is_floating_point() or positions.dtype == torch.bool:
        raise TypeError(f"{name} are {positions.dtype}; expected token positions (torch.int64)")
    batch, length = logits.shape
    if tuple(positions.shape) not in ((batch,), (batch, 1)):
        raise ValueError(f"{name} have shape {list(positions.shape)}; expected [{batch}]")
    targets = positions.reshape(-1).long().clamp(max=length)
    if not torch.compiler.is_compiling() and batch:
        if int(targets.min()) < 0:
            raise ValueError(f"{name} hold {int(targets.min())}; expected 0 or more")
        # Masked places have the lowest logit there is: no text has an answer there.
        inside = targets.clamp(max=length - 1)[:, None]
        lost = (targets < length) & (
            logits.detach().gather(1, inside)[:, 0] == torch.finfo(logits.dtype).min
        )
        if bool(lost.any()):
            row = int(lost.nonzero()[0])
            raise ValueError(
                f"{name}[{row}] is {int(targets[row])}, where the text is masked; expected a token "
                "of the text"
            )
    return F.cross_entropy(logits, targets, ignore_index=length)


def _reduction(num_items: Tensor | int | None) -> str:
    return "mean" if num_items is None else "sum"


def _reduced(loss: Tensor, num_items: Tensor | int | None) -> Tensor:
    return loss if num_items is None else loss / num_items


def _on_device(device: torch.device, name: str, labels: Tensor) -> None:
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name} are {type(labels).__name__}; expected a tensor")
    if labels.device != device:
        raise ValueError(f"{name} are on {labels.device}; the model is on {device}")


def _problem_type(num_labels: int, labels: Tensor) -> str:
    if num_labels == 1:
        return "regression"
    if labels.is_floating_point():
        return "multi_label_classification"
    return "single_label_classification"
