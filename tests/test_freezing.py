"""Freezing: below what is trained nothing is computed or kept. Mapped files and their pages."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import make_classifier, pad_batch, random_ids
from safetensors.torch import load_file
from stub_classifier import StubClassifier
from stub_runs import rows, run
from tolerance import assert_same_bits
from torch import Tensor, nn

from xlmr_ext import autograd, ops
from xlmr_ext.mapped_memory import give_back
from xlmr_ext.training.thrift import thrift
from xlmr_ext.weights import Pieces, open_weights, tensors_to_save, write_weights

LENGTHS = (9, 1, 17, 4)
LAYERS = 4
DROPOUT = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
BACKWARDS = ("linear", "feed_forward", "attention", "layer_norm", "embedding")


def classifier() -> Any:
    torch.manual_seed(3)
    return make_classifier(num_hidden_layers=LAYERS, **DROPOUT).train()


def step(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> tuple[Counter[str], int]:
    """Backward ops of a step by name, and the bytes kept for it beside the parameters."""
    calls: Counter[str] = Counter()

    def counted(name: str, op: Any) -> Any:
        def call(*args: Any) -> Any:
            calls[name] += 1
            return op(*args)

        return call

    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch.manual_seed(7)
    batch = {**pad_batch([random_ids(n) for n in LENGTHS]), "labels": torch.arange(4) % 3}
    with monkeypatch.context() as patch:
        for name in BACKWARDS:
            patch.setattr(ops, f"{name}_backward", counted(name, getattr(ops, f"{name}_backward")))
        torch.manual_seed(8)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(**batch).loss
        loss.backward()
    return calls, sum(kept.values())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_below_what_is_trained(
    monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    whole = classifier()
    if checkpointing:
        whole.gradient_checkpointing_enable()
    calls, size = step(whole, monkeypatch)
    assert calls["embedding"] == 1
    assert calls["feed_forward"] == calls["attention"] == LAYERS
    sizes = [size]
    for frozen in range(1, LAYERS + 1):
        model = classifier()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.freeze_layers(frozen)
        ours, size = step(model, monkeypatch)
        assert ours["embedding"] == 0
        assert ours["feed_forward"] == ours["attention"] == LAYERS - frozen
        assert ours["layer_norm"] == 2 * (LAYERS - frozen)
        sizes.append(size)
        theirs = dict(whole.named_parameters())
        for name, parameter in model.named_parameters():
            below = "embeddings" in name or any(f"layer.{i}." in name for i in range(frozen))
            assert (parameter.grad is None) == below, name
            if not below:
                # Dropout included: frozen parts drop out as they did.
                assert_same_bits(parameter.grad, theirs[name].grad, name)
    assert sizes == sorted(set(sizes), reverse=True)
    assert sizes[-1] < sizes[0] / 8  # of the head alone


def test_a_frozen_embedding_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, model = classifier(), classifier().freeze_embeddings()
    _, before = step(whole, monkeypatch)
    calls, size = step(model, monkeypatch)
    assert calls["embedding"] == 0
    assert size < before
    for name, parameter in model.roberta.encoder.named_parameters():
        wanted = whole.roberta.encoder.get_parameter(name).grad
        assert_same_bits(parameter.grad, wanted, name)


def test_what_is_kept_for_frozen_functions() -> None:
    """Frozen weights in a trainable stack: their inputs are not kept."""
    x = torch.randn(7, 12, requires_grad=True)
    up, down = torch.randn(20, 12), torch.randn(12, 20)
    kept: list[Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    y = x * 1.0
    with hooks:
        out = autograd.feed_forward(autograd.linear(y, up[:12]), up, None, down, None)
    assert not any(t.shape == (7, 12) for t in kept)
    assert sum(t.shape == (7, 20) for t in kept) == 1  # the pre-activation, for the way back to x
    out.sum().backward()
    inner = x.detach().clone().requires_grad_()
    hidden = nn.functional.gelu((inner @ up[:12].T) @ up.T)
    (hidden @ down.T).sum().backward()
    assert inner.grad is not None
    assert x.grad is not None
    torch.testing.assert_close(x.grad, inner.grad, rtol=1e-4, atol=1e-4)


def test_bad_arguments() -> None:
    model = classifier()
    with pytest.raises(ValueError, match=r"freeze_layers is 5; the model has 4 layers"):
        model.freeze_layers(5)
    with pytest.raises(TypeError, match="whole number"):
        model.freeze_layers(True)
    assert all(p.requires_grad for p in model.freeze_layers(0).parameters())
    for options, error in (
        ({"freeze_layers": -1}, ValueError),
        ({"freeze_layers": 3}, ValueError),
        ({"freeze_embeddings": 1}, TypeError),
        ({"gradient_checkpointing": -1}, ValueError),
    ):
        with pytest.raises(error):
            run(StubClassifier(), rows(16), **options)


def test_a_run_leaves_the_model_as_it_was() -> None:
    model = classifier()
    model.classifier.dense.requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    with thrift(model, 2, False, 2):
        assert model.is_gradient_checkpointing
        assert not any(p.requires_grad for p in model.roberta.encoder.layer[:2].parameters())
        assert model.roberta.encoder.checkpoint_every == 2
    assert [p.requires_grad for p in model.parameters()] == before
    assert not model.is_gradient_checkpointing


# --- What a mapped file takes ---------------------------------------------------------------------


def in_memory(path: Path) -> int:
    """Bytes of this file that are in this process's memory."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split(maxsplit=1)[0]
        if "-" in first:
            inside = line.endswith(str(path))
        elif inside and first == "Rss:":
            found += 1024 * int(line.split()[1])
    return found


def test_pages_are_given_back_but_not_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    table = torch.arange(3 << 20, dtype=torch.float32).reshape(-1, 256)
    write_weights(tensors_to_save({"table": table, "other": torch.ones(3)}), path)
    assert torch.equal(load_file(path)["table"], table)
    with open_weights(path) as handle:
        assert handle.metadata() == {"format": "pt"}
    from xlmr_ext.formats.weights_file import SafetensorsFile

    mapped = SafetensorsFile(path).read("table")
    mapped[1000] = -1.0
    assert torch.equal(mapped[1001:], table[1001:])
    assert in_memory(path) > 8 << 20
    give_back(mapped)
    assert in_memory(path) < 1 << 20
    assert bool((mapped[1000] == -1.0).all())
    mapped[1000] = table[1000]
    assert torch.equal(mapped, table)
    own = torch.full((1 << 20,), 3.0)
    give_back(own)
    assert bool((own == 3.0).all())
    # Writing the mapped table elsewhere leaves nothing of it behind.
    write_weights({"table": mapped}, tmp_path / "second.safetensors")
    assert in_memory(path) < 1 << 20
    assert torch.equal(load_file(tmp_path / "second.safetensors")["table"], table)


def test_a_table_is_written_in_pieces(tmp_path: Path) -> None:
    asked: list[tuple[int, int]] = []

    def make(first: int, last: int) -> Tensor:
        asked.append((first, last))
        return torch.arange(first, last).float()[:, None].expand(-1, 1 << 10).contiguous()

    pieces = Pieces((9001, 1 << 10), torch.float32, make)
    write_weights(tensors_to_save({"a": pieces, "b": torch.arange(5)}), tmp_path / "x.safetensors")
    assert len(asked) > 2
    written = load_file(tmp_path / "x.safetensors")
    assert torch.equal(written["a"][:, 7], torch.arange(9001).float())
    assert torch.equal(written["b"], torch.arange(5))
