"""The masked language model: parity with transformers, its tied matrix, its checkpoints."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import (
    assert_parity,
    gradients,
    make_config,
    pack,
    pad_batch,
    random_ids,
    randomize,
    twin,
)
from safetensors.torch import load_file, save_file
from tolerance import FORWARD, GRADIENT, assert_same_bits
from torch import Tensor
from torch.nn import functional as F

from xlmr_ext import XLMRobertaForMaskedLM, XLMRobertaModel

WORDS = "roberta.embeddings.word_embeddings.weight"
LENGTHS = (9, 1, 17, 4, 12)


def language_model(**overrides: Any) -> XLMRobertaForMaskedLM:
    return randomize(XLMRobertaForMaskedLM(make_config(**overrides))).eval()


def labelled_batch() -> dict[str, Tensor]:
    """Right-padded, a third of the tokens labelled."""
    batch = pad_batch([random_ids(n) for n in LENGTHS])
    labels = torch.randint(0, 61, batch["input_ids"].shape)
    chosen = (batch["attention_mask"] == 1) & (torch.rand(labels.shape) < 0.4)
    chosen[:, 0] = True
    return {**batch, "labels": labels.where(chosen, -100)}


@pytest.mark.parametrize("tied", [True, False])
def test_parity_of_logits_loss_and_every_gradient(isa: str, tied: bool) -> None:
    pytest.importorskip("transformers")
    model = language_model(tie_word_embeddings=tied).train()
    inputs = labelled_batch()
    real = inputs["attention_mask"] == 1
    runs: list[dict[str, Tensor]] = []
    grads: list[dict[str, Tensor]] = []
    for net in (model, twin(model, torch.float64), twin(model, torch.float32)):
        net.zero_grad()
        more = {"output_logits": True} if net is model else {}
        output = net(**inputs, **more)
        output.loss.backward()
        runs.append({"loss": output.loss.detach(), "logits": output.logits[real].detach()})
        found = gradients_by_our_names(net, tied)
        grads.append(found)
    assert_parity(*runs, factor=FORWARD)
    assert_parity(*grads, factor=GRADIENT)


def gradients_by_our_names(model: Any, tied: bool) -> dict[str, Tensor]:
    """transformers' tied matrix has its other name. Where nothing is tied, one bias is unused."""
    if not tied:
        assert model.lm_head.bias.grad is None
        model.lm_head.bias.grad = model.lm_head.decoder.bias.grad
    found = gradients(model)
    if tied and WORDS not in found:
        found[WORDS] = found.pop("lm_head.decoder.weight")
    found.pop("lm_head.decoder.bias", None)
    return found


def test_outputs_have_the_names_and_places_of_transformers() -> None:
    pytest.importorskip("transformers")
    model, inputs = language_model(), labelled_batch()
    ours, theirs = (
        m(**inputs, output_hidden_states=True) for m in (model, twin(model, torch.float32))
    )
    assert type(ours).__name__ == type(theirs).__name__
    assert list(ours.keys()) == list(theirs.keys()) == ["loss", "logits", "hidden_states"]
    assert ours.logits.shape == theirs.logits.shape
    loss, logits = model(**inputs, return_dict=False)
    assert torch.equal(logits, ours.logits)
    assert torch.equal(loss, ours.loss)


def test_logits_are_returned_but_in_a_training_step() -> None:
    model, inputs = language_model(), labelled_batch()
    unlabelled = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    assert model(**inputs).logits is not None
    assert list(model(**inputs, output_logits=False)) == ["loss"]
    model.train()
    assert list(model(**inputs)) == ["loss"]
    assert list(model(**inputs, output_logits=True)) == ["loss", "logits"]
    assert list(model(**unlabelled)) == ["logits"]


def test_loss_and_gradients_are_those_of_the_logits() -> None:
    """Both ways to the loss, by the package's own logits in float64."""
    model, inputs = language_model().double(), labelled_batch()
    labels = inputs["labels"]
    output = model(**inputs)
    plain = F.cross_entropy(output.logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(output.loss, plain)
    output.loss.backward(retain_graph=True)
    ours = {name: grad.clone() for name, grad in gradients(model).items()}
    model.zero_grad()
    plain.backward()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(ours[name], grad, msg=name)


def test_packed_is_padded_and_a_text_alone_has_its_bits() -> None:
    model = language_model()
    rows = [random_ids(n) for n in LENGTHS]
    batch = pad_batch(rows)
    real = batch["attention_mask"] == 1
    labels = torch.randint(0, 61, real.shape).where(real, -100)
    padded = model(**batch, labels=labels)
    packed = model(packed=pack(rows), labels=labels[real])
    assert_same_bits(padded.logits[real], packed.logits)
    assert_same_bits(padded.loss, packed.loss)
    assert_same_bits(model(rows[2][None]).logits[0], padded.logits[2, : LENGTHS[2]])


def test_num_items_in_batch_divides_the_sum() -> None:
    model, inputs = language_model(), labelled_batch()
    count = int((inputs["labels"] != -100).sum())
    mean = model(**inputs).loss
    torch.testing.assert_close(model(**inputs, num_items_in_batch=2 * count).loss, mean / 2)
    # As torch: the mean of nothing.
    nothing = {**inputs, "labels": torch.full_like(inputs["labels"], -100)}
    model.train()
    loss = model(**nothing).loss
    assert loss.isnan()
    loss.backward()
    assert not model.lm_head.decoder.weight.grad.any()


def test_a_hook_or_another_decoder_is_called() -> None:
    model, inputs = language_model().train(), labelled_batch()
    wanted = model(**inputs).loss
    calls: list[int] = []
    handle = model.lm_head.decoder.register_forward_hook(lambda *a: calls.append(len(a[1][0])))
    hooked = model(**inputs).loss
    assert calls == [int((inputs["labels"] != -100).sum())]
    torch.testing.assert_close(hooked, wanted)
    handle.remove()
    other = torch.nn.Linear(24, 61)
    other.load_state_dict(model.lm_head.decoder.state_dict())
    model.set_output_embeddings(other)
    assert model.get_output_embeddings() is other
    torch.testing.assert_close(model(**inputs).loss, wanted)


BAD: list[tuple[Any, type[Exception], str]] = [
    (torch.zeros(2, 4), TypeError, "labels are torch.float32"),
    (torch.zeros(2, 5, dtype=torch.int64), ValueError, r"\[2, 5\].*\[2, 4\]"),
    (torch.full((2, 4), 61), ValueError, "labels hold 61; expected 0 to 60"),
    (torch.full((2, 4), -1), ValueError, "labels hold -1"),
    ([0, 1], TypeError, "labels are list"),
]


@pytest.mark.parametrize(("labels", "error", "message"), BAD)
def test_bad_labels(labels: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        language_model()(**pad_batch([random_ids(4), random_ids(3)]), labels=labels)


# --- The tied matrix ------------------------------------------------------------------------------


def is_tied(model: XLMRobertaForMaskedLM) -> bool:
    words = model.get_input_embeddings().weight
    head = model.lm_head
    tied = head.decoder.weight is words
    assert (head.decoder.bias is head.bias) == tied
    return tied


def test_the_matrix_is_one_parameter_through_everything() -> None:
    model = XLMRobertaForMaskedLM(make_config())
    assert is_tied(model)
    assert not model.get_input_embeddings().weight[1].any()  # padding's row, as it was initialised
    assert not model.lm_head.bias.any()
    assert is_tied(copy.deepcopy(model))
    assert is_tied(model.double())
    assert WORDS in dict(model.named_parameters())
    assert "lm_head.decoder.weight" not in dict(model.named_parameters())
    assert "lm_head.decoder.weight" in model.state_dict()
    table = torch.nn.Embedding(61, 24, padding_idx=1)
    model.set_input_embeddings(table)
    model.tie_weights()
    assert is_tied(model)
    assert model.lm_head.decoder.weight is table.weight
    assert not is_tied(XLMRobertaForMaskedLM(make_config(tie_word_embeddings=False)))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("rows", [40, 61, 70])
def test_resizing_keeps_what_stays(tied: bool, mean: bool, rows: int) -> None:
    model = language_model(tie_word_embeddings=tied)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    held = model.lm_head.decoder.weight
    model.resize_token_embeddings(rows, mean_resizing=mean)
    assert is_tied(model) == tied
    assert model.lm_head.decoder.weight is held
    assert model.config.vocab_size == model.lm_head.decoder.out_features == rows
    kept = min(rows, 61)
    for name, tensor in model.state_dict().items():
        if tensor.shape != before[name].shape:
            assert tensor.shape == (rows, *before[name].shape[1:])
        assert torch.equal(tensor[:kept], before[name][:kept]), name
    bias = model.lm_head.decoder.bias[61:]
    wanted = (
        before["lm_head.decoder.bias"].mean().expand(len(bias)) if mean else torch.zeros(len(bias))
    )
    torch.testing.assert_close(bias.detach(), wanted, atol=1e-3, rtol=0)
    ids = random_ids(8, rows)[None]
    output = model.train()(ids, labels=ids)
    output.loss.backward()
    assert model.lm_head.decoder.weight.grad.shape == (rows, 24)


def test_resizing_refuses_another_decoder() -> None:
    model = language_model()
    model.set_output_embeddings(torch.nn.Linear(24, 61))
    with pytest.raises(TypeError, match="the decoder is Linear; expected the head's own"):
        model.resize_token_embeddings(70)
    assert model.config.vocab_size == 61


def test_frozen_models_keep_their_scores(tmp_path: Path) -> None:
    model = language_model()
    ids = random_ids(9)[None]
    wanted = model(ids).logits
    frozen = copy.deepcopy(model).optimize_for_inference()
    assert_same_bits(frozen(ids).logits, wanted)
    frozen.save_frozen(tmp_path / "float32")
    back = XLMRobertaForMaskedLM.from_pretrained(tmp_path / "float32")
    assert is_tied(back)
    assert_same_bits(back(ids).logits, wanted)
    int8 = model.optimize_for_inference("int8")
    rounded = int8(ids).logits
    int8.tie_weights()
    assert_same_bits(int8(ids).logits, rounded)
    int8.save_frozen(tmp_path / "int8")
    back = XLMRobertaForMaskedLM.from_pretrained(tmp_path / "int8")
    assert_same_bits(back(ids).logits, rounded)


# --- Checkpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_checkpoints_go_both_ways(tied: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = language_model(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "ours")
    written = load_file(tmp_path / "ours" / "model.safetensors")
    assert ("lm_head.decoder.weight" in written) != tied
    cls = transformers.XLMRobertaForMaskedLM
    theirs, info = cls.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["unexpected_keys"]
    ids = random_ids(9)[None]
    assert not info["missing_keys"]
    torch.testing.assert_close(theirs.eval()(ids).logits, model(ids).logits)
    theirs.save_pretrained(tmp_path / "theirs")
    back, loading = XLMRobertaForMaskedLM.from_pretrained(
        tmp_path / "theirs", output_loading_info=True
    )
    assert not loading["missing_keys"]
    assert is_tied(back) == tied
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


def test_a_state_dict_that_was_gathered_is_written_once(tmp_path: Path) -> None:
    """As Trainer and accelerate give it: other tensors of the same values, by every name."""
    model = language_model()
    gathered = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=gathered)
    assert "lm_head.decoder.weight" not in load_file(tmp_path / "model.safetensors")
    assert is_tied(XLMRobertaForMaskedLM.from_pretrained(tmp_path))
    # Another matrix is no copy of the first: it is kept for whoever wants it.
    gathered["lm_head.decoder.weight"] += 1
    model.save_pretrained(tmp_path, state_dict=gathered)
    with pytest.raises(ValueError, match="differ, and are one parameter"):
        XLMRobertaForMaskedLM.from_pretrained(tmp_path)
    apart = XLMRobertaForMaskedLM.from_pretrained(tmp_path, tie_word_embeddings=False)
    assert torch.equal(apart.lm_head.decoder.weight, gathered["lm_head.decoder.weight"])


def test_files_with_every_name_and_without_prefix(tmp_path: Path) -> None:
    """Older checkpoints hold the matrix twice."""
    model = language_model()
    model.save_pretrained(tmp_path)
    everything = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(everything, tmp_path / "model.safetensors", metadata={"format": "pt"})
    back = XLMRobertaForMaskedLM.from_pretrained(tmp_path)
    assert is_tied(back)
    assert torch.equal(back.lm_head.decoder.weight, everything[WORDS])


def test_base_model_and_missing_head(tmp_path: Path) -> None:
    base = randomize(XLMRobertaModel(make_config())).eval()
    base.save_pretrained(tmp_path)
    model, info = XLMRobertaForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert is_tied(model)
    assert torch.equal(model.lm_head.decoder.weight, base.embeddings.word_embeddings.weight)
    assert sorted(info["missing_keys"]) == [
        "lm_head.bias",
        "lm_head.dense.bias",
        "lm_head.dense.weight",
        "lm_head.layer_norm.bias",
        "lm_head.layer_norm.weight",
    ]
    assert not model.lm_head.bias.any()
    assert model(random_ids(5)[None]).logits.isfinite().all()
