"""What decides a run of continued pre-training beside its text and its model, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass

from xlmr_ext.training.settings import check_count, check_recipe


@dataclass(frozen=True)
class PretrainSettings:
    """The arguments of :func:`xlmr_ext.training.pretrain` that its result depends on."""

    steps: int | None
    epochs: float | None
    batch_size: int
    gradient_accumulation_steps: int
    learning_rate: float
    warmup_ratio: float
    weight_decay: float
    max_grad_norm: float | None
    max_length: int
    alpha: float
    mlm_probability: float
    shuffle_blocks: int
    seed: int

    def check(self) -> None:
        """TypeError or ValueError where an argument is out of its range."""
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(
                f"steps is {self.steps} and epochs is {self.epochs}; expected one of them"
            )
        if self.steps is not None:
            check_count("steps", self.steps)
        elif self.epochs is not None and not (self.epochs > 0 and math.isfinite(self.epochs)):
            raise ValueError(f"epochs must be above 0, got {self.epochs}")
        for name in ("batch_size", "gradient_accumulation_steps", "shuffle_blocks"):
            check_count(name, getattr(self, name))
        check_recipe(self)
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be from 0 to 1, got {self.alpha}")

    @property
    def step_size(self) -> int:
        """Blocks of an optimiser step."""
        return self.batch_size * self.gradient_accumulation_steps

    def total_steps(self, steps_an_epoch: float) -> int:
        """The steps of the run."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return max(1, math.ceil(self.epochs * steps_an_epoch))
