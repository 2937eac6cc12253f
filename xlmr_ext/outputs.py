"""What the models return: fields by name, by key, or by place among those that are not None."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NoReturn

from torch import Tensor
from torch.utils import _pytree as pytree


class ModelOutput(OrderedDict[str, Any]):
    """Base of the output dataclasses: a dict of the fields that are not None, as Hugging Face's.

    An integer or a slice takes from :meth:`to_tuple`. Assigning a field or a key keeps both in
    step; a field that becomes None leaves the dict. Entries are not taken out in other ways.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def __init_subclass__(cls) -> None:
        # So that torch.compile, DistributedDataParallel and torch.func look inside.
        pytree.register_pytree_node(
            cls,
            lambda output: (list(output.values()), list(output.keys())),
            lambda values, names: _rebuild(cls, dict(zip(names, values, strict=True))),
            serialized_type_name=f"{cls.__module__}.{cls.__name__}",
        )

    def __post_init__(self) -> None:
        # accelerate and DataParallel rebuild an output from one dict, or from pairs.
        first, *others = (field.name for field in fields(self))
        given = getattr(self, first)
        if isinstance(given, (Mapping, Iterator)) and not any(name in self for name in others):
            setattr(self, first, None)
            for name, value in dict(given).items():
                self[name] = value

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
        if name not in self.__dataclass_fields__:
            return
        if value is not None:
            super().__setitem__(name, value)
        elif name in self:
            super().__delitem__(name)

    def __setitem__(self, name: str, value: Any) -> None:
        if name in self.__dataclass_fields__:
            setattr(self, name, value)
        else:
            super().__setitem__(name, value)
            object.__setattr__(self, name, value)

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are not None."""
        return tuple(self.values())

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), dict(self))

    def _fixed(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__} keeps its entries: assign to a field, or take dict(output)"
        )

    __delitem__ = _fixed
    clear = _fixed
    pop = _fixed
    popitem = _fixed
    setdefault = _fixed
    update = _fixed


def _rebuild(cls: type[ModelOutput], entries: dict[str, Any]) -> ModelOutput:
    output = cls()
    for name, value in entries.items():
        output[name] = value
    return output


@dataclass
class BaseModelOutputWithPooling(ModelOutput):
    """Output of :class:`XLMRobertaModel`.

    Attributes:
        last_hidden_state: [B, S, hidden], zeros at masked places; [N, hidden] for packed input.
        pooler_output: [B, hidden], or None without a pooler.
        hidden_states: the embeddings' and each layer's output, shaped as ``last_hidden_state``.
        attentions: each layer's probabilities [B, heads, S, S], zeros where the query or the key is
            masked; for packed input S is ``max_seqlen``. In train mode after dropout.
    """

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class SequenceClassifierOutput(ModelOutput):
    """Output of :class:`XLMRobertaForSequenceClassification`.

    Attributes:
        loss: scalar, where labels were given.
        logits: [B, num_labels].
        hidden_states, attentions: as in :class:`BaseModelOutputWithPooling`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class TokenClassifierOutput(ModelOutput):
    """Output of :class:`XLMRobertaForTokenClassification`.

    Attributes:
        loss: scalar, where labels were given.
        logits: [B, S, num_labels]; [N, num_labels] for packed input.
        hidden_states, attentions: as in :class:`BaseModelOutputWithPooling`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class MaskedLMOutput(ModelOutput):
    """Output of :class:`XLMRobertaForMaskedLM`.

    Attributes:
        loss: scalar, where labels were given.
        logits: [B, S, vocab_size]; [N, vocab_size] for packed input. None in a training step, see
            ``output_logits``.
        hidden_states, attentions: as in :class:`BaseModelOutputWithPooling`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class QuestionAnsweringModelOutput(ModelOutput):
    """Output of :class:`XLMRobertaForQuestionAnswering`.

    Attributes:
        loss: scalar, where both positions were given.
        start_logits, end_logits: [B, S], the lowest number of their type at masked places; [N] for
            packed input.
        hidden_states, attentions: as in :class:`BaseModelOutputWithPooling`.
    """

    loss: Tensor | None = None
    start_logits: Tensor | None = None
    end_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class MultipleChoiceModelOutput(ModelOutput):
    """Output of :class:`XLMRobertaForMultipleChoice`.

    Attributes:
        loss: scalar, where labels were given.
        logits: [B, K], one score a choice.
        hidden_states, attentions: of the B * K rows, as in :class:`BaseModelOutputWithPooling`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


__all__ = [
    "BaseModelOutputWithPooling",
    "MaskedLMOutput",
    "ModelOutput",
    "MultipleChoiceModelOutput",
    "QuestionAnsweringModelOutput",
    "SequenceClassifierOutput",
    "TokenClassifierOutput",
]
