"""What the models return: fields by name, by key, or by place among those that are not None."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree


class ModelOutput:
    """Base of the output dataclasses; behaves as Hugging Face's do."""

    def items(self) -> list[tuple[str, Any]]:
        """Name and value of the fields that are not None, in order."""
        pairs = ((f.name, getattr(self, f.name)) for f in fields(self))  # type: ignore[arg-type]
        return [(name, value) for name, value in pairs if value is not None]

    def keys(self) -> list[str]:
        return [name for name, _ in self.items()]

    def values(self) -> list[Any]:
        return [value for _, value in self.items()]

    def get(self, name: str, default: Any = None) -> Any:
        return dict(self.items()).get(name, default)

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(self.values())

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str):
            return dict(self.items())[key]
        return self.to_tuple()[key]

    def __contains__(self, name: object) -> bool:
        return name in self.keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.items())


@dataclass
class BaseModelOutputWithPooling(ModelOutput):
    """Output of :class:`XLMRobertaModel`.

    Attributes:
        last_hidden_state: [B, S, hidden], zeros at masked places; [N, hidden] for packed input.
        pooler_output: [B, hidden], or None without a pooler.
        hidden_states: the embeddings' and each layer's output, shaped as ``last_hidden_state``.
    """

    last_hidden_state: Tensor
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class SequenceClassifierOutput(ModelOutput):
    """Output of :class:`XLMRobertaForSequenceClassification`.

    Attributes:
        loss: scalar, where labels were given.
        logits: [B, num_labels].
        hidden_states: as in :class:`BaseModelOutputWithPooling`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class TokenClassifierOutput(ModelOutput):
    """Output of :class:`XLMRobertaForTokenClassification`.

    Attributes:
        loss: scalar, where labels were given.
        logits: [B, S, num_labels]; [N, num_labels] for packed input.
        hidden_states: as in :class:`BaseModelOutputWithPooling`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class QuestionAnsweringModelOutput(ModelOutput):
    """Output of :class:`XLMRobertaForQuestionAnswering`.

    Attributes:
        loss: scalar, where both positions were given.
        start_logits, end_logits: [B, S], the lowest number of their type at masked places; [N] for
            packed input.
        hidden_states: as in :class:`BaseModelOutputWithPooling`.
    """

    loss: Tensor | None = None
    start_logits: Tensor | None = None
    end_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class MultipleChoiceModelOutput(ModelOutput):
    """Output of :class:`XLMRobertaForMultipleChoice`.

    Attributes:
        loss: scalar, where labels were given.
        logits: [B, K], one score a choice.
        hidden_states: of the B * K rows, as in :class:`BaseModelOutputWithPooling`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


def _register(cls: type[ModelOutput]) -> None:
    # So that torch.compile, DistributedDataParallel and torch.func look inside.
    names = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    pytree.register_pytree_node(
        cls,
        lambda output: ([getattr(output, name) for name in names], None),
        lambda values, _: cls(*values),
        serialized_type_name=f"{cls.__module__}.{cls.__name__}",
    )


for _cls in (
    BaseModelOutputWithPooling,
    SequenceClassifierOutput,
    TokenClassifierOutput,
    QuestionAnsweringModelOutput,
    MultipleChoiceModelOutput,
):
    _register(_cls)

__all__ = [
    "BaseModelOutputWithPooling",
    "ModelOutput",
    "MultipleChoiceModelOutput",
    "QuestionAnsweringModelOutput",
    "SequenceClassifierOutput",
    "TokenClassifierOutput",
]
