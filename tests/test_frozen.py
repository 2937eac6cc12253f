"""The frozen encoder: the same bits as the layers, for every head; what it refuses."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import make_config, pack, pad_batch, random_ids, randomize
from torch import Tensor, nn

from xlmr_ext import (
    PackedBatch,
    XLMRobertaForMultipleChoice,
    XLMRobertaForQuestionAnswering,
    XLMRobertaForSequenceClassification,
    XLMRobertaForTokenClassification,
    XLMRobertaModel,
)

LENGTHS = (9, 1, 17, 4, 33)
MODELS: dict[str, Callable[..., Any]] = {
    "encoder": XLMRobertaModel,
    "classifier": XLMRobertaForSequenceClassification,
    "tokens": XLMRobertaForTokenClassification,
    "answers": XLMRobertaForQuestionAnswering,
    "choice": XLMRobertaForMultipleChoice,
}


def make(kind: str, **overrides: Any) -> Any:
    sizes = {"num_labels": 2, "num_hidden_layers": 3, **overrides}
    return randomize(MODELS[kind](make_config(**sizes))).eval()


def frozen(model: Any) -> Any:
    return copy.deepcopy(model).optimize_for_inference()


def texts() -> list[Tensor]:
    return [random_ids(length) for length in LENGTHS]


def inputs_of(kind: str) -> dict[str, Tensor]:
    batch = pad_batch(texts())
    if kind == "choice":
        return {name: tensor[:4].reshape(2, 2, -1) for name, tensor in batch.items()}
    return batch


def same(ours: Any, theirs: Any) -> None:
    assert list(ours.keys()) == list(theirs.keys())
    for mine, its in zip(ours.to_tuple(), theirs.to_tuple(), strict=True):
        for a, b in zip(*((x,) if isinstance(x, Tensor) else x for x in (mine, its)), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("keep", [False, True], ids=["last", "hidden_states"])
@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_same_bits_as_the_layers(isa: str, kind: str, keep: bool) -> None:
    model = make(kind)
    inputs = inputs_of(kind)
    same(
        frozen(model)(**inputs, output_hidden_states=keep),
        model(**inputs, output_hidden_states=keep),
    )


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_same_bits_packed_with_an_empty_text(kind: str) -> None:
    model = make(kind)
    rows = [*texts()[:3], torch.empty(0, dtype=torch.int64)]
    more = {"num_choices": 2} if kind == "choice" else {}
    same(frozen(model)(packed=pack(rows), **more), model(packed=pack(rows), **more))


@torch.no_grad()
def test_embeddings_types_and_positions() -> None:
    model = make("encoder", type_vocab_size=2)
    batch = pad_batch(texts())
    words = model.embeddings.word_embeddings(batch["input_ids"])
    types = torch.randint(0, 2, batch["input_ids"].shape)
    positions = torch.randint(0, 40, batch["input_ids"].shape)
    given = {
        "inputs_embeds": words,
        "attention_mask": batch["attention_mask"],
        "token_type_ids": types,
        "position_ids": positions,
    }
    same(frozen(model)(**given), model(**given))


@pytest.mark.parametrize(
    "overrides",
    [
        {"hidden_act": "gelu_new"},
        {"hidden_act": "relu"},
        {"position_embedding_type": "sinusoidal"},
        {"num_hidden_layers": 1},
    ],
    ids=str,
)
@torch.no_grad()
def test_other_configurations(overrides: dict[str, Any]) -> None:
    model, inputs = make("classifier", **overrides), inputs_of("classifier")
    same(frozen(model)(**inputs), model(**inputs))


@torch.no_grad()
def test_float64() -> None:
    model, inputs = make("classifier").double(), inputs_of("classifier")
    same(frozen(model)(**inputs), model(**inputs))


@torch.no_grad()
def check_alone_and_on_threads(model: Any) -> None:
    """A classifier's row has the same bits alone and on any number of threads."""
    rows = texts()
    together = model(packed=pack(rows)).logits
    for index, row in enumerate(rows):
        assert torch.equal(model(row[None]).logits[0], together[index])
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(model(packed=pack(rows)).logits, together)


def test_a_row_is_the_same_alone_and_on_any_number_of_threads(restore_threads: None) -> None:
    check_alone_and_on_threads(frozen(make("classifier")))


@torch.no_grad()
def test_nothing_to_do() -> None:
    model = frozen(make("classifier"))
    assert model(packed=PackedBatch.from_sequences([])).logits.shape == (0, 2)
    empty = PackedBatch.from_sequences([[]])
    assert torch.equal(model(packed=empty).logits, make_zero_logits(model))


def make_zero_logits(model: Any) -> Tensor:
    """What the head makes of a first token that is not there."""
    with torch.no_grad():
        logits: Tensor = model.classifier(torch.zeros(1, model.config.hidden_size))
    return logits


def test_weights_are_given_up() -> None:
    model = make("classifier")
    weights = sum(p.numel() for p in model.roberta.encoder.parameters())
    before = model.num_parameters()
    assert model.optimize_for_inference() is model
    assert model.num_parameters() == before - weights
    assert model.optimize_for_inference() is model  # nothing left to do
    assert not model.training


@pytest.mark.parametrize("packed", ["float32", "bfloat16", "int8"])
@torch.no_grad()
def test_copies_stand_alone(packed: str) -> None:
    model = make("classifier").optimize_for_inference(packed)
    inputs = inputs_of("classifier")
    expected = model(**inputs).logits
    copied, loaded = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    del model
    gc.collect()
    junk = [torch.full((n,), torch.nan) for n in range(100, 4000, 7)]
    assert torch.equal(copied(**inputs).logits, expected)
    assert torch.equal(loaded(**inputs).logits, expected)
    del junk


def test_what_a_frozen_model_refuses(tmp_path: Path) -> None:
    model = frozen(make("classifier"))
    for action in (
        lambda: model.train(),
        lambda: model.roberta.train(),
        lambda: model.save_pretrained(tmp_path / "saved"),
        lambda: model.state_dict(),
        lambda: model.load_state_dict(make("classifier").state_dict()),
        lambda: model.resize_token_embeddings(model.config.vocab_size + 3),
        lambda: model.roberta.resize_token_embeddings(pad_to_multiple_of=64),
    ):
        with pytest.raises(RuntimeError, match=r"packed for inference \(optimize_for"):
            action()
    assert not model.training
    assert not (tmp_path / "saved" / "config.json").exists()
    with pytest.raises(ValueError, match="output_attentions=True: the frozen encoder"):
        model(**inputs_of("classifier"), output_attentions=True)
    words = torch.randn(1, 3, model.config.hidden_size, requires_grad=True)
    with pytest.raises(ValueError, match="inputs_embeds requires a gradient"):
        model(inputs_embeds=words)
    model.roberta.embeddings.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="embeddings have a hook"):
        model(**inputs_of("classifier"))


def test_a_weight_written_to_after_it_was_packed() -> None:
    model = make("classifier")
    weight = model.roberta.encoder.layer[1].output.dense.weight
    model.optimize_for_inference()
    model(**inputs_of("classifier"))
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"encoder\.layer\.1\.output\.dense\.weight was written"):
        model(**inputs_of("classifier"))


def _hook(model: Any) -> None:
    model.roberta.encoder.layer[1].attention.self.register_forward_hook(lambda *_: None)


def _replace(model: Any) -> None:
    model.roberta.encoder.layer[1].output.dense = nn.Linear(37, 24)


def _parametrize(model: Any) -> None:
    torch.nn.utils.parametrizations.weight_norm(model.roberta.encoder.layer[1].intermediate.dense)


@pytest.mark.parametrize("change", [_hook, _replace, _parametrize])
def test_layers_that_are_not_plain(change: Callable[[Any], None]) -> None:
    model = make("classifier")
    change(model)
    with pytest.raises(ValueError, match=r"encoder\.layer\.1 has a hook, an adapter"):
        model.optimize_for_inference()
    # Nothing was taken apart.
    assert len(model.roberta.encoder.layer) == 3
    model(**inputs_of("classifier"))


def test_layers_that_differ_in_more_than_weights() -> None:
    """What the native call knows once for all layers."""
    for change in (
        lambda layer: setattr(layer.output.LayerNorm, "eps", 0.5),
        lambda layer: setattr(layer.attention.output.LayerNorm, "eps", 0.5),
        lambda layer: setattr(layer.intermediate, "activation", "relu"),
        lambda layer: setattr(layer.attention.self, "num_attention_heads", 2),
    ):
        model = make("classifier")
        change(model.roberta.encoder.layer[1])
        with pytest.raises(ValueError, match=r"the layers differ in \(heads, activation, eps\)"):
            model.optimize_for_inference()
    model = make("classifier")
    model.roberta.embeddings.LayerNorm.eps = 0.5
    with pytest.raises(ValueError, match=r"LayerNorm has eps 0\.5, the layers' "):
        frozen(model)(**inputs_of("classifier"))


@torch.no_grad()
def test_hooks_on_the_model_still_run() -> None:
    """A hook on the encoder's model sees its whole output, so no short cut is taken."""
    model = make("classifier")
    seen: list[Any] = []
    fast = frozen(model)
    fast.roberta.register_forward_hook(lambda _, __, output: seen.append(output))
    inputs = inputs_of("classifier")
    assert torch.equal(fast(**inputs).logits, model(**inputs).logits)
    assert seen[0].last_hidden_state.shape == (5, 33, 24)


def test_another_table_than_it_was_packed_for() -> None:
    from xlmr_ext import _launch

    tables = _launch.isas()
    if len(tables) < 2:
        pytest.skip("this processor runs one table")
    before = _launch.build_info()["table"]
    try:
        _launch.set_isa(tables[0])
        model = frozen(make("classifier"))
        _launch.set_isa(tables[1])
        with pytest.raises(RuntimeError, match=f"packed for the table {tables[0]}, {tables[1]}"):
            model(**inputs_of("classifier"))
    finally:
        _launch.set_isa(before)
