"""What decides a training run beside its data and its model, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

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
    bf16: bool
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
        check_recipe(self)
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay must be above 0 and at most 1, got {self.layer_decay}")
        check_smoothing(self.label_smoothing)

    @property
    def step_size(self) -> int:
        """Examples of an optimiser step."""
        return self.batch_size * self.gradient_accumulation_steps


class Recipe(Protocol):
    """What every run has, whatever it learns."""

    @property
    def learning_rate(self) -> float: ...
    @property
    def warmup_ratio(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def max_grad_norm(self) -> float | None: ...
    @property
    def seed(self) -> int: ...


def check_recipe(recipe: Recipe) -> None:
    """ValueError where one of these is out of its range."""
    if not (recipe.learning_rate > 0 and math.isfinite(recipe.learning_rate)):
        raise ValueError(f"learning_rate must be above 0, got {recipe.learning_rate}")
    if not 0 <= recipe.warmup_ratio <= 1:
        raise ValueError(f"warmup_ratio must be from 0 to 1, got {recipe.warmup_ratio}")
    if not (recipe.weight_decay >= 0 and math.isfinite(recipe.weight_decay)):
        raise ValueError(f"weight_decay must be 0 or more, got {recipe.weight_decay}")
    if recipe.max_grad_norm is not None and not recipe.max_grad_norm > 0:
        raise ValueError(f"max_grad_norm must be above 0 or None, got {recipe.max_grad_norm}")
    if not 0 <= recipe.seed < 2**32:
        raise ValueError(f"seed must be from 0 to 2**32 - 1, got {recipe.seed}")


def check_course(log_steps: int, save_steps: int | None, *, resume: bool, has_output: bool) -> None:
    """TypeError or ValueError where what a run leaves on its way is not as it can be."""
    check_count("log_steps", log_steps)
    if save_steps is not None:
        check_count("save_steps", save_steps, least=0)
    if resume and not has_output:
        raise ValueError("resume came without output_dir, where the state of training is")


def check_count(name: str, value: object, least: int = 1) -> None:
    """TypeError or ValueError where ``value`` is no whole number from ``least`` on."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
