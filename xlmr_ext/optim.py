"""What fine-tuning asks of an optimiser: groups, a schedule, and a vocabulary cut to the data."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from xlmr_ext.layers import is_plain
from xlmr_ext.mapped_memory import give_back
from xlmr_ext.weights import Pieces

if TYPE_CHECKING:
    from xlmr_ext.pretrained import PreTrainedModel

_LAYER = re.compile(r"(?:^|\.)encoder\.layer\.(\d+)\.")
_EMBEDDINGS = re.compile(r"(?:^|\.)embeddings\.")


def parameter_groups(
    model: torch.nn.Module, weight_decay: float, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Trainable parameters in groups: matrices decay, biases and LayerNorm vectors do not.

    Args:
        layer_decay: what a layer's learning rate is of that of the layer above it (Clark et al.
            2020, arXiv 2003.10555, appendix A): ``scale`` of a group is ``layer_decay`` to the
            power of its depth, which is 0 of the head, 1 of the last layer, and the number of
            layers + 1 of the embeddings.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    layers = 1 + max((int(m[1]) for name, _ in named if (m := _LAYER.search(name))), default=-1)
    groups: dict[tuple[int, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in named:
        depth = 0 if layer_decay == 1.0 else _depth(name, layers)
        groups.setdefault((depth, parameter.ndim <= 1), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": 0.0 if spared else weight_decay,
            "scale": layer_decay**depth,
        }
        for (depth, spared), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def _depth(name: str, layers: int) -> int:
    """How far below the head a parameter is, in layers."""
    found = _LAYER.search(name)
    if found is not None:
        return layers - int(found[1])
    return layers + 1 if _EMBEDDINGS.search(name) else 0


def adamw(
    model: torch.nn.Module, learning_rate: float, weight_decay: float, layer_decay: float
) -> torch.optim.Optimizer:
    """AdamW on the groups of :func:`parameter_groups`; ValueError where there is no parameter."""
    groups = parameter_groups(model, weight_decay, layer_decay)
    if not groups:
        raise ValueError("the model has no parameter that requires a gradient")
    # One fused kernel a parameter; torch has it for these types on the CPU and on CUDA.
    fused = all(
        p.dtype in (torch.float32, torch.float64) and p.device.type in ("cpu", "cuda")
        for group in groups
        for p in group["params"]
    )
    return torch.optim.AdamW(groups, lr=learning_rate, fused=fused)


def clip_gradients(optimizer: torch.optim.Optimizer, max_norm: float | None) -> float:
    """Scales the gradient of all parameters together down to this 2-norm; its norm before. None
    only measures."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return float(torch.nn.utils.clip_grad_norm_(parameters, max_norm or math.inf))


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the learning rate of every group of :func:`parameter_groups`; ``rate`` is the head's."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]


def warmup_steps(total: int, ratio: float) -> int:
    """Steps of warm-up: ``ratio`` of the total, rounded to the nearest, at least 1 if any."""
    return min(total, max(1, round(total * ratio))) if ratio > 0 else 0


def linear_schedule(step: int, total: int, warmup: int) -> float:
    """Factor of the learning rate at ``step``, counted from 1.

    Rises linearly to 1 at step ``warmup`` and falls linearly to 0 at step ``total + 1``, so that
    no step of the run is taken with a rate of 0.
    """
    if step <= warmup:
        return step / warmup
    return max(0.0, (total + 1 - step) / (total + 1 - warmup))


class NarrowVocabulary:
    """Trains the word-embedding rows that a data set uses, in place of the whole table.

    The other rows get no gradient, so AdamW would do nothing to them but decay them by
    1 - learning rate * weight decay a step; that is done at once when the table is made whole.
    The result is that of training the whole table up to rounding, while gradient and optimiser
    state shrink from 250,002 rows to some thousands.

    The whole table itself is left as it lies, as a rule in a mapped file, until the end: a
    checkpoint gets it piece by piece from :meth:`table`, so it need not be in memory.

    Args:
        model: a model whose ``roberta.embeddings.word_embeddings`` is a plain trainable
            ``torch.nn.Embedding``; see :meth:`applies`.
        sequences: the token ids of everything that the model will be given while narrowed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sequences: Iterable[Sequence[int]],
    ) -> None:
        self._embedding = word_embeddings(model)
        self._whole = _parameter(self._embedding)
        used = [np.arange(int(model.config.pad_token_id) + 1, dtype=np.int64)]
        used += [np.asarray(sequence, dtype=np.int64) for sequence in sequences]
        # Sorted, and with every row up to the padding row: so padding keeps its id.
        rows = np.unique(np.concatenate(used))
        self._place = {int(row): place for place, row in enumerate(rows)}
        self._rows = torch.from_numpy(rows).to(self._whole.device)
        self._pending_decay = 1.0
        self._applied: list[float] = []  # to the rows without data, one after the other
        self._is_whole = False
        self.weight = torch.nn.Parameter(self.cut(self._whole.detach()))

    @staticmethod
    def applies(model: PreTrainedModel) -> bool:
        """Whether the word embeddings can be swapped without anybody noticing."""
        try:
            embedding = word_embeddings(model)
        except (AttributeError, TypeError):
            return False
        # A tied weight, a hook or a parametrization would see another tensor than it expects.
        uses = sum(
            parameter is embedding.weight
            for _, parameter in model.named_parameters(remove_duplicate=False)
        )
        weight = embedding.weight
        hooked = (
            not is_plain(embedding)
            or weight._backward_hooks
            or getattr(weight, "_post_accumulate_grad_hooks", None)
        )
        padding = model.config.pad_token_id
        return bool(
            isinstance(embedding.weight, torch.nn.Parameter)
            and embedding.weight.requires_grad
            and uses == 1
            and not hooked
            and padding is not None
            and 0 <= padding < embedding.num_embeddings
        )

    def ids(self, sequence: Sequence[int]) -> list[int]:
        """Token ids as rows of the narrow table."""
        return [self._place[token] for token in sequence]

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Notes one step of an optimiser that has :attr:`weight`, at the rate that it has now."""
        group = next(
            group
            for group in optimizer.param_groups
            if any(parameter is self.weight for parameter in group["params"])
        )
        self._pending_decay *= 1.0 - group["lr"] * group["weight_decay"]

    def cut(self, table: torch.Tensor) -> torch.Tensor:
        """A copy of the rows of a whole table that the narrow one has."""
        rows = table.detach()[self._rows.to(table.device)]
        give_back(table)
        return rows

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The model runs on the narrow table within; then on its own, brought up to date."""
        self._install(self.weight)
        try:
            yield
        finally:
            self._make_whole()
            self._install(self._whole)

    @contextmanager
    def shown_whole(self) -> Iterator[None]:
        """Within :meth:`installed`: the model has its whole table for a look.

        Rows that the data does not use lack their decay, some millionths, until the end: the rate
        of the steps to come is small, and whether these count is open until the best epoch is
        known.
        """
        with torch.no_grad():
            self._whole[self._rows] = self.weight
        self._install(self._whole)
        try:
            yield
        finally:
            self._install(self.weight)

    def settle_decay(self) -> None:
        """The decay up to now counts: the weights of now are the ones to keep."""
        if self._pending_decay != 1.0:
            self._applied.append(self._pending_decay)
            self._pending_decay = 1.0

    def table(self) -> Pieces:
        """The whole table with the weights and the decay of now, for a checkpoint."""
        decays = [*self._applied, self._pending_decay]
        whole, weight = self._whole.detach(), self.weight.detach()

        def make(first: int, last: int) -> torch.Tensor:
            piece = whole[first:last].clone()
            give_back(whole[first:last])
            for decay in decays:
                if decay != 1.0:
                    piece.mul_(decay)
            ends = torch.tensor([first, last], device=self._rows.device)
            low, high = torch.searchsorted(self._rows, ends).tolist()
            piece[self._rows[low:high] - first] = weight[low:high]
            return piece

        return Pieces(tuple(whole.shape), whole.dtype, make)

    def adopt(self, table: torch.Tensor) -> None:
        """Takes a table that equals :meth:`table`, and is mapped from the file where that was
        written, for the model's own, so that at the end nothing has to be made."""
        if table.shape == self._whole.shape and table.dtype == self._whole.dtype:
            self._whole.data = table
            self._is_whole = True

    def _make_whole(self) -> None:
        """Writes the narrow table, and the decay of the other rows, into the whole one."""
        if self._is_whole:
            return
        self.settle_decay()
        with torch.no_grad():
            for decay in self._applied:
                self._whole.mul_(decay)
            self._whole[self._rows] = self.weight
        self._is_whole = True

    def forget_decay(self) -> None:
        """Drops what was noted since :meth:`settle_decay`: the weights were set back."""
        self._pending_decay = 1.0

    def state(self) -> dict[str, Any]:
        """What :meth:`restore` needs beside :attr:`weight`: the decay of the rows without data."""
        return {"pending": self._pending_decay, "applied": list(self._applied)}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes up what :meth:`state` gave, on a model that is as it was at the start."""
        self._pending_decay, self._applied = state["pending"], list(state["applied"])

    def _install(self, weight: torch.nn.Parameter) -> None:
        self._embedding.weight = weight
        self._embedding.num_embeddings = weight.shape[0]


def word_embeddings(model: PreTrainedModel) -> torch.nn.Embedding:
    """The table of words; AttributeError or TypeError where the model has none that is plain."""
    embedding = model.get_submodule("roberta.embeddings.word_embeddings")
    if not isinstance(embedding, torch.nn.Embedding):
        raise TypeError(f"the word embeddings are no Embedding but {type(embedding).__name__}")
    return embedding


def _parameter(embedding: torch.nn.Embedding) -> torch.nn.Parameter:
    if not isinstance(embedding.weight, torch.nn.Parameter):
        raise TypeError(
            f"the word embeddings are no parameter but {type(embedding.weight).__name__}"
        )
    return embedding.weight
