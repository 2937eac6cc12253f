"""What a run does to take less memory: activations checkpointed, parts of the model frozen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from xlmr_ext.training.settings import check_count

if TYPE_CHECKING:
    from xlmr_ext.pretrained import PreTrainedModel


def check_thrift(
    model: PreTrainedModel,
    gradient_checkpointing: bool | int,
    freeze_embeddings: bool,
    freeze_layers: int,
) -> None:
    """TypeError or ValueError where an argument of :func:`thrift` is out of its range."""
    if not isinstance(gradient_checkpointing, bool):
        check_count("gradient_checkpointing", gradient_checkpointing, least=0)
    if not isinstance(freeze_embeddings, bool):
        raise TypeError(f"freeze_embeddings must be a bool, got {type(freeze_embeddings).__name__}")
    check_count("freeze_layers", freeze_layers, least=0)
    layers = getattr(model.config, "num_hidden_layers", 0)
    if freeze_layers > layers:
        raise ValueError(f"freeze_layers is {freeze_layers}; the model has {layers} layers")


@contextmanager
def thrift(
    model: PreTrainedModel,
    gradient_checkpointing: bool | int,
    freeze_embeddings: bool,
    freeze_layers: int,
) -> Iterator[None]:
    """Within, the model is as the arguments of ``finetune`` say; then as it was before."""
    frozen = [p for p in model.parameters() if p.requires_grad]
    checkpoints = bool(gradient_checkpointing) and not model.is_gradient_checkpointing
    try:
        if freeze_embeddings:
            model.freeze_embeddings()
        if freeze_layers:
            model.freeze_layers(freeze_layers)
        if checkpoints:
            model.gradient_checkpointing_enable(every_n_layers=int(gradient_checkpointing))
        yield
    finally:
        if checkpoints:
            model.gradient_checkpointing_disable()
        for parameter in frozen:
            parameter.requires_grad_(True)
