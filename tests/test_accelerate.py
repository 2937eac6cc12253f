"""Inside accelerate: prepared, accumulated, clipped, saved and loaded, as with a model of torch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import make_classifier, make_config, pad_batch, random_ids, randomize
from tolerance import assert_same_bits
from torch import Tensor, nn
from torch.utils.data import DataLoader

from xlmr_ext import XLMRobertaForSequenceClassification, XLMRobertaForTokenClassification

accelerate = pytest.importorskip("accelerate")

LENGTHS = (9, 4, 17, 4, 12, 1, 3, 8, 5, 6, 30, 2)
DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}


def rows() -> list[dict[str, Tensor]]:
    return [{"ids": random_ids(n), "label": torch.tensor(i % 3)} for i, n in enumerate(LENGTHS)]


def collate(batch: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    padded = pad_batch([row["ids"] for row in batch])
    return {**padded, "labels": torch.stack([row["label"] for row in batch])}


def make_accelerator(**settings: Any) -> Any:
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    return accelerate.Accelerator(cpu=True, **settings)


def by_hand(
    model: nn.Module, batches: list[dict[str, Tensor]], steps: int, clip: float, precision: str
) -> list[float]:
    """The loop in plain torch that accelerate's must equal."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for index, batch in enumerate(batches):
        torch.manual_seed(index)  # loaders draw random numbers as well
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            loss = model(**batch).loss
        losses.append(loss.item())
        (loss / steps).backward()
        if (index + 1) % steps == 0:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
    return losses


def with_accelerate(
    accelerator: Any, model: nn.Module, data: list[dict[str, Tensor]], clip: float
) -> tuple[Any, Any, list[float]]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    loader = DataLoader(data, batch_size=3, collate_fn=collate)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for index, batch in enumerate(loader):
        torch.manual_seed(index)
        with accelerator.accumulate(prepared):
            loss = prepared(**batch).loss
            losses.append(loss.item())
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(prepared.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
    return prepared, optimizer, losses


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_loop_is_that_of_torch(steps: int, precision: str) -> None:
    model = make_classifier(**DROPOUT).train()
    data, twin = rows(), copy.deepcopy(model)
    accelerator = make_accelerator(gradient_accumulation_steps=steps, mixed_precision=precision)
    prepared, _, losses = with_accelerate(accelerator, model, data, clip=0.5)
    batches = [collate(data[first : first + 3]) for first in range(0, len(data), 3)]
    assert losses == by_hand(twin, batches, steps, clip=0.5, precision=precision)
    unwrapped = accelerator.unwrap_model(prepared)
    assert type(unwrapped) is XLMRobertaForSequenceClassification
    for (name, ours), wanted in zip(unwrapped.named_parameters(), twin.parameters(), strict=True):
        assert_same_bits(ours.detach(), wanted.detach(), name)


def test_state_saved_and_loaded(tmp_path: Path) -> None:
    model = make_classifier(**DROPOUT).train()
    data = rows()
    accelerator = make_accelerator()
    prepared, optimizer, _ = with_accelerate(accelerator, model, data, clip=1.0)
    accelerator.save_state(str(tmp_path / "state"))
    batch = collate(data[:4])

    def step() -> tuple[float, dict[str, Tensor]]:
        optimizer.zero_grad()
        loss = prepared(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        return loss.item(), {n: p.detach().clone() for n, p in prepared.named_parameters()}

    first = step()
    step()
    accelerator.load_state(str(tmp_path / "state"))
    again = step()
    assert again[0] == first[0]
    for name, value in first[1].items():
        assert_same_bits(again[1][name], value, name)


def test_the_model_saved(tmp_path: Path) -> None:
    """``save_pretrained`` as accelerate's documents write it."""
    model = make_classifier()
    accelerator = make_accelerator()
    prepared = accelerator.prepare(model)
    accelerator.wait_for_everyone()
    accelerator.unwrap_model(prepared).save_pretrained(
        tmp_path,
        is_main_process=accelerator.is_main_process,
        save_function=accelerator.save,
        state_dict=accelerator.get_state_dict(prepared),
    )
    loaded = XLMRobertaForSequenceClassification.from_pretrained(tmp_path)
    batch = collate(rows()[:3])
    assert_same_bits(loaded(**batch).logits, model(**batch).logits)


def test_metrics_are_gathered() -> None:
    """Logits of token classifiers are padded across processes, then gathered."""
    model = randomize(XLMRobertaForTokenClassification(make_config())).eval()
    accelerator = make_accelerator()
    prepared, loader = accelerator.prepare(
        model, DataLoader(rows(), batch_size=5, collate_fn=collate)
    )
    count = 0
    with torch.no_grad():
        for batch in loader:
            labels = batch.pop("labels")
            output = prepared(**batch)
            padded = accelerator.pad_across_processes(output, dim=1)
            assert_same_bits(padded.logits, output.logits)
            gathered = accelerator.gather_for_metrics((output.logits.argmax(-1)[:, 0], labels))
            count += len(gathered[0])
            assert torch.equal(gathered[1], labels)
    assert count == len(LENGTHS)


def test_memory_is_estimated_and_dispatched() -> None:
    """What its big-model tools ask: sizes by module, and a device map on the CPU."""
    from accelerate.utils import compute_module_sizes, infer_auto_device_map

    model = make_classifier()
    assert compute_module_sizes(model)[""] == model.get_memory_footprint()
    devices = infer_auto_device_map(model, max_memory={"cpu": "1GB"})
    assert set(devices.values()) == {"cpu"}


def test_data_parallel_of_torch(tmp_path: Path) -> None:
    """One process of DistributedDataParallel: it finds the tensors inside an output."""
    model = make_classifier()
    batch = collate(rows()[:3])
    model(**batch, output_hidden_states=True).loss.backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        output = parallel(**batch, output_hidden_states=True)
        assert list(output) == ["loss", "logits", "hidden_states"]
        output.loss.backward()
    finally:
        torch.distributed.destroy_process_group()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert_same_bits(parameter.grad, wanted[name], name)
