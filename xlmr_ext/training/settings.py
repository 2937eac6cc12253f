"""What decides a training run beside its data and its model, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass

from xlmr_ext.tasks.weighting import check_smoothing


@dataclass(frozen=True)
class Settings:
    """The arguments of :func:`xlmr_ext.training.finetune` that its result depends on."""

    epochs: int
    batch_size: int
    gradient_accumulation_steps: int
    learning_rate: float
    warmup_ratio: float
    weight_decay: float
    layer_decay: float
    max_grad_norm: float | None
    max_length: int
    seed: int
    bucket_batches: int
    label_smoothing: float
    class_weights: tuple[float, ...] | str | None
    eval_steps: int | None
    early_stopping_patience: int | None
    freeze_embeddings: bool = False
    freeze_layers: int = 0

    def check(self, *, has_dev: bool) -> None:
        """TypeError or ValueError where an argument is out of its range."""
        for name in ("epochs", "batch_size", "gradient_accumulation_steps", "bucket_batches"):
            check_count(name, getattr(self, name))
        for name in ("eval_steps", "early_stopping_patience"):
            value = getattr(self, name)
            if value is not None:
                check_count(name, value)
                if not has_dev:
                    raise ValueError(f"{name} came without dev, the data to evaluate on")
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}")
        if not 0 <= self.warmup_ratio <= 1:
            raise ValueError(f"warmup_ratio must be from 0 to 1, got {self.warmup_ratio}")
        if not (self.weight_decay >= 0 and math.isfinite(self.weight_decay)):
            raise ValueError(f"weight_decay must be 0 or more, got {self.weight_decay}")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay must be above 0 and at most 1, got {self.layer_decay}")
        check_smoothing(self.label_smoothing)
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be above 0 or None, got {self.max_grad_norm}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be from 0 to 2**32 - 1, got {self.seed}")

    @property
    def step_size(self) -> int:
        """Examples of an optimiser step."""
        return self.batch_size * self.gradient_accumulation_steps


def check_count(name: str, value: object, least: int = 1) -> None:
    """TypeError or ValueError where ``value`` is no whole number from ``least`` on."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
