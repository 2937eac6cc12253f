"""Attention probabilities on request: the kernel's own, beside transformers' eager attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pairs import (
    assert_parity,
    gradients,
    make_classifier,
    make_config,
    make_encoder,
    pack,
    pad_batch,
    random_ids,
    randomize,
    twin,
)
from tolerance import FORWARD, GRADIENT, assert_same_bits
from torch import Tensor

import xlmr_ext
from xlmr_ext import _C, layers, reference

LENGTHS = (9, 1, 17, 4, 12)


def real(mask: Tensor) -> Tensor:
    """[B, 1, S, S]: where a token looks at a token."""
    return (mask[:, None, :, None] * mask[:, None, None, :]) == 1


def masks() -> dict[str, dict[str, Tensor]]:
    right, left = (pad_batch([random_ids(n) for n in LENGTHS], s, 2) for s in ("right", "left"))
    gaps = {name: tensor.clone() for name, tensor in right.items()}
    gaps["attention_mask"][0, 2:5] = 0
    gaps["attention_mask"][2, [1, 9, 16]] = 0
    return {"right": right, "left": left, "gaps": gaps}


@pytest.mark.parametrize("which", ["right", "left", "gaps"])
def test_as_in_transformers(isa: str, which: str) -> None:
    pytest.importorskip("transformers")
    model, inputs = make_classifier(num_attention_heads=4), masks()[which]
    if which == "left":
        # transformers counts positions over the padding's ids; so ours are given.
        inputs["position_ids"] = (inputs["input_ids"] != 1).cumsum(1).clamp(min=1) + 1
    inside = real(inputs["attention_mask"])
    results = []
    for dtype in (None, torch.float64, torch.float32):
        output = (model if dtype is None else twin(model, dtype))(
            **inputs, output_attentions=True, output_hidden_states=True
        )
        assert list(output) == ["logits", "hidden_states", "attentions"]
        assert len(output.attentions) == 2
        if dtype is None:
            # transformers fills the rows of masked queries; here they hold nothing.
            for attention in output.attentions:
                assert attention.shape == (5, 4, 19, 19)
                assert not attention[~inside.expand_as(attention)].any()
        results.append({str(i): (p * inside).detach() for i, p in enumerate(output.attentions)})
    assert_parity(*results, factor=FORWARD)


def test_gradients_as_in_transformers(isa: str) -> None:
    pytest.importorskip("transformers")
    model, inputs = make_classifier(), masks()["gaps"]
    weights = torch.randn(2, 5, 3, 19, 19) * real(inputs["attention_mask"])
    grads = []
    for dtype in (None, torch.float64, torch.float32):
        current = model if dtype is None else twin(model, dtype)
        output = current(**inputs, output_attentions=True)
        loss = output.logits.sum()
        for weight, attention in zip(weights, output.attentions, strict=True):
            loss = loss + (weight.to(attention.dtype) * attention).sum()
        loss.backward()
        grads.append(gradients(current))
    # What the attentions add must be seen in what they depend on.
    assert grads[1]["roberta.encoder.layer.1.attention.self.key.weight"].abs().max() > 0.1
    assert_parity(*grads, factor=GRADIENT)


def test_the_rest_of_the_output_keeps_its_bits() -> None:
    model, inputs = make_classifier(), masks()["gaps"]
    plain = model(**inputs, labels=torch.arange(5) % 3)
    seen = model(**inputs, labels=torch.arange(5) % 3, output_attentions=True)
    assert_same_bits(seen.loss, plain.loss)
    assert_same_bits(seen.logits, plain.logits)
    assert plain.attentions is None


@pytest.mark.parametrize("length", [1, 7, 8, 9, 38])
def test_rows_are_distributions(dtype: torch.dtype, length: int) -> None:
    """At the borders of the blocks that the columns are asked for in (head_size is 8)."""
    model = make_encoder().to(dtype)
    for attention in model(random_ids(length)[None], output_attentions=True).attentions:
        assert attention.shape == (1, 3, length, length)
        assert attention.dtype == dtype
        assert (attention >= 0).all()
        torch.testing.assert_close(attention.sum(-1), torch.ones(1, 3, length, dtype=dtype))


def test_packed_input() -> None:
    model = make_encoder()
    texts = [random_ids(n) for n in (9, 0, 17, 4)]
    packed = model(packed=pack(texts), output_attentions=True).attentions
    padded = model(**pad_batch(texts), output_attentions=True).attentions
    for ours, wanted in zip(packed, padded, strict=True):
        assert_same_bits(ours, wanted)
        assert not ours[1].any()
    roomy = pack(texts)
    roomy.max_seqlen = 21
    wide = model(packed=roomy, output_attentions=True).attentions[0]
    assert wide.shape == (4, 3, 21, 21)
    assert_same_bits(wide[:, :, :17, :17].contiguous(), packed[0])
    assert not wide[:, :, :, 17:].any()
    assert model(packed=pack([]), output_attentions=True).attentions[0].shape == (0, 3, 0, 0)


def test_a_fully_masked_row() -> None:
    model, inputs = make_encoder(), masks()["right"]
    inputs["attention_mask"][3] = 0
    output = model(**inputs, output_attentions=True)
    assert not output.attentions[0][3].any()
    sum(a.pow(2).sum() for a in output.attentions).backward()
    query = model.encoder.layer[0].attention.self.query.weight.grad
    assert query.isfinite().all()
    assert query.any()


def test_in_train_mode_they_are_those_after_dropout(isa: str) -> None:
    """With the mask that the output was computed with: times the values they give the context."""
    model = make_encoder(num_hidden_layers=1, attention_probs_dropout_prob=0.4).train()
    texts = [random_ids(n) for n in (13, 5)]
    attention = model.encoder.layer[0].attention.self
    seen: dict[str, Any] = {}
    attention.register_forward_hook(lambda module, args, out: seen.update(args=args, out=out))
    probabilities = model(packed=pack(texts), output_attentions=True).attentions[0]
    hidden, _, _, dropout, site, _ = seen["args"]
    value = attention.value(hidden).reshape(18, 3, 8)
    for text, rows in enumerate((slice(0, 13), slice(13, 18))):
        size = rows.stop - rows.start
        part = probabilities[text, :, :size, :size]
        context = torch.einsum("hqk,khd->qhd", part, value[rows]).reshape(size, 24)
        torch.testing.assert_close(context, seen["out"][0][rows])
        keep = reference.dropout_mask(0.4, site, dropout._seed, 3, 18, size)[:, rows] > 0
        assert torch.equal(part > 0, keep)
    assert not torch.equal(probabilities.sum(-1), torch.ones(2, 3, 13))


HEADS = {
    "XLMRobertaForSequenceClassification": {"labels": torch.tensor([1, 0])},
    "XLMRobertaForTokenClassification": {"labels": torch.ones(2, 6, dtype=torch.int64)},
    "XLMRobertaForQuestionAnswering": {
        "start_positions": torch.tensor([1, 2]),
        "end_positions": torch.tensor([3, 2]),
    },
}


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("return_dict", [True, False])
def test_through_the_heads(name: str, return_dict: bool) -> None:
    """As a field, and in transformers' place in tuples."""
    pytest.importorskip("transformers")
    model = randomize(getattr(xlmr_ext, name)(make_config(num_labels=2))).eval()
    ids = torch.stack([random_ids(6), random_ids(6)])
    asked = {"output_attentions": True, "output_hidden_states": True, "return_dict": return_dict}
    results = [m(ids, **HEADS[name], **asked) for m in (model, twin(model, torch.float32))]
    if return_dict:
        assert list(results[0]) == list(results[1])
    ours, theirs = (r.to_tuple() if return_dict else r for r in results)
    assert len(ours) == len(theirs)
    for mine, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, wanted)


def test_through_multiple_choice() -> None:
    pytest.importorskip("transformers")
    model = randomize(xlmr_ext.XLMRobertaForMultipleChoice(make_config())).eval()
    ids = torch.stack([random_ids(6) for _ in range(6)]).reshape(2, 3, 6)
    for mine, wanted in zip(
        model(ids, output_attentions=True).attentions,
        twin(model, torch.float32)(ids, output_attentions=True).attentions,
        strict=True,
    ):
        assert mine.shape == (6, 3, 6, 6)
        torch.testing.assert_close(mine, wanted)


def test_configured() -> None:
    model, ids = make_encoder(output_attentions=True, return_dict=False), random_ids(6)[None]
    assert [type(part) for part in model(ids)] == [Tensor, Tensor, tuple]
    assert len(model(ids, output_attentions=False)) == 2


@pytest.mark.parametrize("name", ["query", "key"])
def test_of_replaced_maps(name: str) -> None:
    """A hook on them counts in the probabilities as well."""
    model, ids = make_encoder(), random_ids(6)[None]
    before = model(ids, output_attentions=True).attentions[0]
    chosen = model.encoder.layer[0].attention.self.get_submodule(name)
    chosen.register_forward_hook(lambda module, args, out: out * 0)
    after = model(ids, output_attentions=True).attentions[0]
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, torch.full((1, 3, 6, 6), 1 / 6))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_under_autocast(kind: torch.dtype) -> None:
    model, inputs = make_classifier(), masks()["right"]
    wanted = model(**inputs, output_attentions=True).attentions
    with torch.autocast("cpu", dtype=kind):
        seen = model(**inputs, output_attentions=True).attentions
    for mine, right in zip(seen, wanted, strict=True):
        if kind == torch.bfloat16 and _C.has_bf16_units():
            torch.testing.assert_close(mine, right, rtol=0.02, atol=0.01)
        else:
            assert_same_bits(mine, right)


def test_nothing_is_computed_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(
        layers, "attention_probabilities", lambda *a, **k: asked.append(1) or torch.zeros(6, 3, 6)
    )
    model, ids = make_encoder(), random_ids(6)[None]
    model(ids)
    assert not asked
    model(ids, output_attentions=True)
    assert len(asked) == 2


# What torch's own compiler warns of is not ours to mend.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning",
                            "ignore::UserWarning")  # fmt: skip
def test_packed_input_compiles_whole() -> None:
    torch._dynamo.reset()
    model = make_encoder(num_hidden_layers=1)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in ((5, 3), (9, 4, 2)):
        batch = pack([random_ids(n) for n in lengths])
        wanted = model(packed=batch, output_attentions=True).attentions[0]
        assert_same_bits(compiled(packed=batch, output_attentions=True).attentions[0], wanted)
    torch._dynamo.reset()
