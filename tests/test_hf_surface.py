"""What tutorials and libraries ask of a model, beside transformers: numbers, embeddings, losses."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import (
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
from tolerance import assert_same_bits
from torch import Tensor, nn

import xlmr_ext
from xlmr_ext import XLMRobertaForSequenceClassification, XLMRobertaModel
from xlmr_ext.refusals import MODELS

HEADS = [name for name in xlmr_ext.__all__ if name.startswith("XLMRobertaFor")]


def head(name: str, **overrides: Any) -> Any:
    labels = {"num_labels": 2} if "Question" in name else {}
    return randomize(getattr(xlmr_ext, name)(make_config(**labels, **overrides))).eval()


# --- Numbers and questions ------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*HEADS, "XLMRobertaModel"])
def test_numbers_are_transformers(name: str) -> None:
    pytest.importorskip("transformers")
    model = head(name)
    theirs: Any = twin(model, torch.float32)
    for frozen in (False, True):
        if frozen:
            for side in (model, theirs):
                side.base_model.requires_grad_(False)
        for only_trainable in (False, True):
            for exclude in (False, True):
                ours = model.num_parameters(only_trainable, exclude)
                assert ours == theirs.num_parameters(only_trainable, exclude)
    assert model.get_memory_footprint(return_buffers=False) == theirs.get_memory_footprint(
        return_buffers=False
    )
    assert model.base_model_prefix == theirs.base_model_prefix
    assert model.main_input_name == theirs.main_input_name
    assert model.supports_gradient_checkpointing == theirs.supports_gradient_checkpointing
    assert model.can_generate() is theirs.can_generate() is False
    assert (model.base_model is model) == (theirs.base_model is theirs)
    if "MaskedLM" in name:
        assert model.get_output_embeddings() is model.lm_head.decoder
    else:
        assert model.get_output_embeddings() is theirs.get_output_embeddings() is None
    assert model.get_input_embeddings() is model.base_model.embeddings.word_embeddings
    assert model.get_position_embeddings() is model.base_model.embeddings.position_embeddings
    assert model.device == theirs.device
    assert model.dtype == theirs.dtype
    assert model.tie_weights() is None


def test_memory_footprint_counts_buffers() -> None:
    model = make_encoder(position_embedding_type="sinusoidal").double()
    parameters = sum(p.numel() for p in model.parameters()) * 8
    assert model.get_memory_footprint(return_buffers=False) == parameters
    assert model.get_memory_footprint() == parameters + 40 * 24 * 8
    with pytest.raises(AttributeError, match="position_embeddings"):
        model.get_position_embeddings()


def test_operations_are_trainers_estimate() -> None:
    model, ids = make_classifier(), torch.zeros(3, 7, dtype=torch.int64)
    assert model.estimate_tokens({"input_ids": ids}) == 21
    words_and_so_on = sum(
        module.weight.numel() for module in model.modules() if isinstance(module, nn.Embedding)
    )
    rest = sum(p.numel() for p in model.parameters()) - words_and_so_on
    assert model.floating_point_ops({"input_ids": ids}) == 6 * 21 * rest
    assert model.floating_point_ops({"inputs_embeds": torch.zeros(3, 7, 24)}) == 0


@pytest.mark.parametrize("name", [*HEADS, "XLMRobertaModel"])
def test_dummy_inputs_run(name: str) -> None:
    model = head(name)
    inputs = model.dummy_inputs
    if "Choice" in name:
        inputs = {"input_ids": inputs["input_ids"][None]}
    assert model(**inputs)[0].isfinite().all()


def test_initialised_anew() -> None:
    torch.manual_seed(3)
    model = XLMRobertaForSequenceClassification(make_config())
    wanted = {name: p.detach().clone() for name, p in model.named_parameters()}
    randomize(model)
    model.init_weights()
    for name, parameter in model.named_parameters():
        old = wanted[name]
        if old.unique().numel() == 1:
            assert_same_bits(parameter.detach(), old, name)
        else:
            assert 0.01 < parameter.std() < 0.03, name
    assert not model.get_input_embeddings().weight[1].any()


@pytest.mark.parametrize("name", sorted(MODELS))
def test_absent_names_say_what_to_use(name: str) -> None:
    """Absent also for hasattr, by which libraries decide."""
    model = make_encoder()
    assert not hasattr(model, name)
    with pytest.raises(AttributeError) as caught:
        getattr(model, name)
    assert str(caught.value) == f"XLMRobertaModel.{name}: {MODELS[name]}"
    assert 4 < len(MODELS[name].split()) < 25


def test_other_names_are_absent_as_ever() -> None:
    model = make_encoder()
    with pytest.raises(AttributeError, match="no attribute 'encodr'"):
        _ = model.encodr
    assert model.get_encoder() is model


def test_the_compiler_is_not_imported(tmp_path: Path) -> None:
    """It takes a second that a model which is not compiled need not wait."""
    program = """
import sys, torch, xlmr_ext
config = xlmr_ext.XLMRobertaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1,
                                   num_attention_heads=1, intermediate_size=16)
model = xlmr_ext.XLMRobertaForSequenceClassification(config)
model(torch.tensor([[0, 5, 2]]), labels=torch.tensor([1])).loss.backward()
print("torch._dynamo" in sys.modules)
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert result.stdout.strip() == "False"


# --- Word embeddings of another size --------------------------------------------------------------


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize(
    ("size", "multiple", "rows"),
    [(70, None, 70), (61, None, 61), (20, None, 20), (62, 8, 64), (None, 50, 100), (64, 8, 64)],
)
def test_resized_as_in_transformers(
    mean: bool, size: int | None, multiple: int | None, rows: int
) -> None:
    pytest.importorskip("transformers")
    model = make_classifier()
    theirs: Any = twin(model, torch.float32)
    before = model.get_input_embeddings().weight.detach().clone()
    results = [m.resize_token_embeddings(size, multiple, mean) for m in (model, theirs)]
    kept = min(rows, 61)
    for side, words in zip((model, theirs), results, strict=True):
        assert words is side.get_input_embeddings()
        assert words.weight.shape == (rows, 24)
        assert words.num_embeddings == rows
        assert words.padding_idx == 1
        assert words.weight.requires_grad
        assert side.config.vocab_size == rows
        assert_same_bits(words.weight.detach()[:kept], before[:kept])
    if rows > 61 and mean:
        near = before.mean(0).expand(rows - 61, -1)
        for words in results:
            torch.testing.assert_close(words.weight[61:], near, rtol=0, atol=2e-4)
            assert words.weight[61:].unique(dim=0).shape[0] == rows - 61
    inputs = pad_batch([random_ids(n, kept) for n in (5, 3)])
    torch.testing.assert_close(model(**inputs).logits, theirs(**inputs).logits)
    if rows > 61:
        inputs["input_ids"][0, 2] = rows - 1
        model(**inputs).logits.sum().backward()
        assert model.get_input_embeddings().weight.grad[rows - 1].any()
    with pytest.raises(ValueError, match=f"input_ids holds {rows}; expected 0 to {rows - 1}"):
        model(torch.tensor([[0, rows]]))


def test_new_rows_have_the_tables_covariance() -> None:
    model = make_encoder(vocab_size=200, hidden_size=6, num_attention_heads=1)
    table = model.get_input_embeddings().weight.detach().double()
    mix = torch.randn(6, 6)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(table.float() @ mix + 3)
    table = model.get_input_embeddings().weight.detach().double()
    model.double().resize_token_embeddings(200 + 40_000)
    new = model.get_input_embeddings().weight.detach()[200:]
    mean, covariance = table.mean(0), torch.cov(table.T, correction=0) * 1e-9
    deviations = covariance.diag().sqrt()
    assert ((new.mean(0) - mean).abs() < 5 * deviations / math.sqrt(40_000)).all()
    relative = (torch.cov(new.T) - covariance) / deviations[:, None] / deviations
    assert relative.abs().max() < 5 * math.sqrt(2 / 40_000)


def test_resizing_keeps_what_holds_the_embeddings() -> None:
    """Hooks, types, frozen states; and a file of the new size loads again."""
    model = make_classifier().double()
    words = model.get_input_embeddings()
    words.weight.requires_grad_(False)
    seen: list[int] = []
    words.register_forward_hook(lambda *_: seen.append(1))
    parameter = words.weight
    assert model.resize_token_embeddings(80) is words
    assert words.weight is parameter
    assert words.weight.dtype == torch.float64
    assert not words.weight.requires_grad
    model(random_ids(4)[None])
    assert seen == [1]
    assert not words.weight[1].eq(words.weight[2]).all()


def test_resized_saved_and_loaded(tmp_path: Path) -> None:
    model = make_classifier()
    model.resize_token_embeddings(75)
    model.save_pretrained(tmp_path)
    loaded = XLMRobertaForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.config.vocab_size == 75
    ids = torch.tensor([[0, 74, 5, 2]])
    assert_same_bits(loaded(ids).logits, model(ids).logits)
    # Its memory is the file's; resizing leaves that alone.
    loaded.resize_token_embeddings(60)
    again = XLMRobertaForSequenceClassification.from_pretrained(tmp_path)
    assert_same_bits(again(ids).logits, model(ids).logits)


def test_bad_sizes() -> None:
    model = make_encoder()
    for arguments, error, message in [
        ((1,), ValueError, "1 rows are too few: row 1 is padding's"),
        ((0,), ValueError, "new_num_tokens is 0; expected 1 or more"),
        ((2.0,), TypeError, r"new_num_tokens is 2\.0; expected a whole number"),
        ((True,), TypeError, "new_num_tokens is True"),
        ((70, -8), ValueError, "pad_to_multiple_of is -8"),
    ]:
        with pytest.raises(error, match=message):
            model.resize_token_embeddings(*arguments)
    model.set_input_embeddings(nn.Sequential(nn.Embedding(61, 24)))
    with pytest.raises(TypeError, match=r"Sequential; expected torch\.nn\.Embedding"):
        model.resize_token_embeddings(70)
    assert model.config.vocab_size == 61


# --- Losses of accumulated batches ----------------------------------------------------------------


def pieces(name: str) -> tuple[dict[str, Tensor], list[dict[str, Tensor]], int]:
    """A batch, the same in two unequal parts, and the number of its labels."""
    inputs = pad_batch([random_ids(n) for n in (5, 3, 8, 2, 6)])
    if "Token" in name or "MaskedLM" in name:
        inputs["labels"] = torch.where(inputs["attention_mask"] == 1, inputs["input_ids"] % 3, -100)
    elif "Choice" in name:
        inputs = {n: t[:, None].expand(-1, 2, -1) for n, t in inputs.items()}
        inputs["labels"] = torch.tensor([0, 1, 1, 0, 1])
    else:
        inputs["labels"] = torch.tensor([0, 2, 1, -100, 1])
    parts = [{n: t[rows] for n, t in inputs.items()} for rows in (slice(0, 2), slice(2, 5))]
    return inputs, parts, int((inputs["labels"] != -100).sum())


LABELLED = [name for name in HEADS if "Question" not in name]


@pytest.mark.parametrize("name", LABELLED)
@pytest.mark.parametrize("kind", [int, torch.tensor])
def test_accumulated_gradients_are_those_of_one_batch(name: str, kind: Any) -> None:
    model = head(name)
    assert model.accepts_loss_kwargs
    whole, parts, count = pieces(name)
    loss = model(**whole).loss
    loss.backward()
    wanted = {n: g.clone() for n, g in gradients(model).items()}
    model.zero_grad()
    total = 0.0
    for part in parts:
        piece = model(**part, num_items_in_batch=kind(count)).loss
        piece.backward()
        total += piece.item()
    assert math.isclose(total, loss.item(), rel_tol=1e-5)
    for n, grad in gradients(model).items():
        torch.testing.assert_close(grad, wanted[n], msg=lambda m, n=n: f"{n}: {m}")


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_accumulated_losses_of_numbers(problem: str) -> None:
    model = make_classifier(problem_type=problem)
    inputs = pad_batch([random_ids(n) for n in (5, 3, 8)])
    labels = torch.randint(0, 2, (3, 3)).float()
    whole = model(**inputs, labels=labels).loss
    parts = [
        model(
            **{n: t[rows] for n, t in inputs.items()}, labels=labels[rows], num_items_in_batch=9
        ).loss
        for rows in (slice(0, 1), slice(1, 3))
    ]
    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.parametrize("name", ["XLMRobertaForQuestionAnswering", "XLMRobertaModel"])
def test_models_without_such_a_loss(name: str) -> None:
    model = head(name)
    assert not model.accepts_loss_kwargs
    with pytest.raises(ValueError, match="num_items_in_batch is not supported"):
        model(random_ids(4)[None], num_items_in_batch=4)


# --- Modes ----------------------------------------------------------------------------------------


def test_a_part_in_train_mode_drops() -> None:
    """Of a model in eval mode; the rest of it does not."""
    model = make_encoder(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    batch = pack([random_ids(n) for n in (9, 4)])
    wanted = model(packed=batch).last_hidden_state
    state = torch.get_rng_state()
    assert_same_bits(model(packed=batch).last_hidden_state, wanted)
    assert torch.equal(torch.get_rng_state(), state), "eval mode drew a random number"
    for name in [
        "embeddings",
        "encoder.layer.0.attention.self",
        "encoder.layer.1.attention.output",
        "encoder.layer.1.output",
    ]:
        part = copy.deepcopy(model)
        part.get_submodule(name).train()
        runs = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            output = part(packed=batch, output_hidden_states=True)
            runs.append(output.last_hidden_state)
        assert_same_bits(runs[0], runs[1], name)
        assert not torch.equal(runs[0], runs[2]), name
        assert not torch.equal(runs[0], wanted), name
        if "layer.1" in name:
            before = model(packed=batch, output_hidden_states=True).hidden_states[1]
            assert_same_bits(output.hidden_states[1], before, name)


def test_half_precision_is_refused_when_it_runs() -> None:
    for turn in (XLMRobertaModel.half, XLMRobertaModel.bfloat16):
        model = turn(make_encoder())
        assert model.dtype in (torch.float16, torch.bfloat16)
        with pytest.raises(TypeError, match="float32"):
            model(random_ids(4)[None])
