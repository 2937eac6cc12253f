"""ModelOutput beside transformers' own: a program does the same with either."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from xlmr_ext import outputs as ours

transformers = pytest.importorskip("transformers")
from transformers import modeling_outputs as theirs  # noqa: E402

NAMES = [name for name in ours.__all__ if name != "ModelOutput"]
TWINS = {"BaseModelOutputWithPooling": "BaseModelOutputWithPoolingAndCrossAttentions"}

LOSS, LOGITS = torch.tensor(0.5), torch.arange(6.0).reshape(2, 3)
STATES = (torch.zeros(2, 4), torch.ones(2, 4))
PAIR = (ours.SequenceClassifierOutput, theirs.SequenceClassifierOutput)


def plain(value: Any) -> Any:
    """A value as plain Python, so that both sides compare; an output counts by its entries."""
    if isinstance(value, Tensor):
        return ("tensor", value.tolist(), value.requires_grad)
    if isinstance(value, Mapping):
        return ("mapping", [(key, plain(entry)) for key, entry in value.items()])
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, [plain(entry) for entry in value])
    if isinstance(value, type({}.keys()) | type(OrderedDict().keys())):
        return ("keys", list(value))
    return value


def with_assigned(output: Any) -> Any:
    output.loss = LOSS * 2
    output["logits"] = LOGITS + 1
    output["extra"] = LOSS
    return output, output.logits, output["loss"], output.extra, output.to_tuple()


def with_a_late_loss(output: Any) -> Any:
    late = type(output)(logits=output.logits)
    late.loss = LOSS
    return list(late), late.to_tuple()


def taken_apart(output: Any) -> Any:
    loss, logits = output[:2]
    (first, *rest) = output.to_tuple()
    return loss, logits, first, rest


def by_keyword(output: Any) -> Any:
    def call(loss: Any = None, logits: Any = None, **others: Any) -> Any:
        return loss, logits, sorted(others)

    return call(**output)


def as_trainer(output: Any) -> Any:
    loss = output["loss"] if isinstance(output, dict) else output[0]
    return loss, tuple(v for k, v in output.items() if k not in ["loss", "hidden_states"])


USES: dict[str, Callable[[Any], Any]] = {
    "isinstance": lambda o: [isinstance(o, t) for t in (dict, OrderedDict, Mapping, tuple, list)],
    "attribute": lambda o: (o.loss, o.logits, o.hidden_states, o.attentions),
    "no attribute": lambda o: hasattr(o, "start_logits"),
    "key": lambda o: (o["loss"], o["logits"]),
    "place": lambda o: (o[0], o[1], o[-1]),
    "slice": lambda o: (o[:2], o[1:], o[::-1]),
    "taken apart": taken_apart,
    "iterated": list,
    "unpacked": lambda o: [*o],
    "keys": lambda o: o.keys(),
    "values": lambda o: list(o.values()),
    "items": lambda o: list(o.items()),
    "len": len,
    "bool": bool,
    "contains": lambda o: ("loss" in o, "attentions" in o, "nothing" in o),
    "get": lambda o: (o.get("logits"), o.get("attentions"), o.get("attentions", 5)),
    "dict": dict,
    "keyword arguments": by_keyword,
    "merged": lambda o: {**o, "more": 1},
    "to_tuple": lambda o: o.to_tuple(),
    "assigned": with_assigned,
    "assigned late": with_a_late_loss,
    "copy.copy": copy.copy,
    "copy.deepcopy": copy.deepcopy,
    "copy method": lambda o: o.copy(),
    "pickled": lambda o: pickle.loads(pickle.dumps(o)),
    "rebuilt from a dict": lambda o: type(o)({k: v * 2 for k, v in list(o.items())[:2]}),
    "rebuilt from pairs": lambda o: type(o)((k, o[k]) for k in o),
    "rebuilt by name": lambda o: type(o)(**o),
    "pytree leaves": lambda o: pytree.tree_flatten(o)[0],
    "pytree map": lambda o: pytree.tree_map(lambda t: t + 1, o),
    "Trainer": as_trainer,
    "repr": lambda o: repr(o).startswith("SequenceClassifierOutput(loss=tensor"),
    "equal to itself": lambda o: o == o,
}


def outcome(use: Callable[[Any], Any], output: Any) -> Any:
    try:
        return plain(use(output))
    except (KeyError, IndexError, ValueError) as error:
        return type(error)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("full", [True, False], ids=["all fields", "logits alone"])
def test_the_same_as_transformers(use: str, full: bool) -> None:
    results = []
    for cls in PAIR:
        output = cls(loss=LOSS, logits=LOGITS, hidden_states=STATES) if full else cls(logits=LOGITS)
        results.append(outcome(USES[use], output))
        if use not in ("assigned", "assigned late"):
            assert type(output) is cls
    assert results[0] == results[1]


@pytest.mark.parametrize(
    "change",
    [
        lambda o: o.pop("loss"),
        lambda o: o.update(loss=LOSS),
        lambda o: o.setdefault("loss", LOSS),
        lambda o: o.__delitem__("loss"),
    ],
    ids=["pop", "update", "setdefault", "del"],
)
def test_entries_stay(change: Callable[[Any], Any]) -> None:
    for cls in PAIR:
        output = cls(loss=LOSS, logits=LOGITS)
        with pytest.raises(Exception, match="SequenceClassifierOutput"):
            change(output)
        assert list(output) == ["loss", "logits"]


def test_entries_stay_in_ways_that_transformers_forgets() -> None:
    output = ours.SequenceClassifierOutput(LOSS, LOGITS)
    for change in (output.clear, output.popitem):
        with pytest.raises(TypeError, match="SequenceClassifierOutput keeps its entries"):
            change()
    # There the key keeps the old value.
    output.loss = None
    assert list(output) == ["logits"]
    assert output.to_tuple() == (LOGITS,)


@pytest.mark.parametrize("name", NAMES)
def test_fields_are_transformers(name: str) -> None:
    """In their order, so that tuples agree; without what only a decoder fills."""
    twin = getattr(theirs, TWINS.get(name, name))
    wanted = [
        n for n in twin.__dataclass_fields__ if n not in ("past_key_values", "cross_attentions")
    ]
    assert list(getattr(ours, name).__dataclass_fields__) == wanted


@pytest.mark.parametrize("name", NAMES)
def test_every_class_is_a_pytree(name: str) -> None:
    cls = getattr(ours, name)
    names = list(cls.__dataclass_fields__)
    output = cls(**{n: torch.full((2,), float(i)) for i, n in enumerate(names) if i != 1})
    doubled = pytree.tree_map(lambda t: t * 2, output)
    assert type(doubled) is cls
    assert {n: v.tolist() for n, v in doubled.items()} == {
        n: [2.0 * i] * 2 for i, n in enumerate(names) if i != 1
    }
    assert getattr(doubled, names[1]) is None
    flat, spec = pytree.tree_flatten(output)
    assert pytree.treespec_loads(pytree.treespec_dumps(spec)) == spec
    assert len(flat) == len(names) - 1


def test_accelerate_takes_it_apart_and_together() -> None:
    """send_to_device, convert_to_fp32, gather and padding rebuild what the model returned."""
    operations = pytest.importorskip("accelerate.utils.operations")
    uses: list[Callable[[Any], Any]] = [
        lambda o: operations.send_to_device(o, "cpu"),
        operations.convert_to_fp32,
        operations.gather,
        lambda o: operations.pad_across_processes(o, dim=0),
        lambda o: operations.concatenate([o, o]),
        lambda o: operations.slice_tensors(o, slice(0, 1)),
        operations.get_data_structure,
    ]
    for index, use in enumerate(uses):
        results = []
        for cls in PAIR:
            output = cls(loss=LOSS.reshape(1), logits=LOGITS.bfloat16(), hidden_states=STATES)
            result = use(output)
            assert type(result) is cls, index
            results.append(plain(result))
        assert results[0] == results[1], index


def test_data_parallel_gathers_it() -> None:
    """torch.nn.parallel gathers by ``type(out)((k, ...) for k in out)``."""
    outputs = [ours.SequenceClassifierOutput(LOSS, LOGITS + i, STATES) for i in range(2)]
    joined = type(outputs[0])((k, [o[k] for o in outputs]) for k in outputs[0])
    assert list(joined) == ["loss", "logits", "hidden_states"]
    assert joined.logits[1] is outputs[1].logits
