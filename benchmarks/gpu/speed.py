"""Whole models beside transformers': time and memory of a forward and of a training pass.

Every model has the same weights, in the same memory. Before a case is timed, logits (in training
gradients, with dropout off) are compared with those of transformers' sdpa. A classifier of
xlmr_ext finishes the last layer for the first token alone; transformers' could and does not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peers.cases import Shape, batch_of, lengths_of
from peers.report import quartiles
from torch import Tensor

from gpu.clock import Clock, Timed, in_turn
from gpu.process import Progress
from gpu.ways import FALLBACK, WAYS, computed_by, refusal

KINDS = ("forward", "training")
REFERENCE, FLASH = "transformers sdpa", "transformers flash_attention_2"
OURS = {f"xlmr_ext {way}": way for way in WAYS}
LIBRARIES = (*OURS, REFERENCE, FLASH)
# Least cosine with the reference that counts as the same function. Half precision's bounds are the
# tests' affair; here a gross error is to be seen.
LEAST_COSINE = {"float64": 0.9999, "float32": 0.9999, "float16": 0.98, "bfloat16": 0.98}
# Gradients of random weights are too small for float16 without it.
_LOSS_SCALE = 1024.0


def run(plan: dict[str, Any], clock: Clock, progress: Progress) -> None:
    """A plan: dtype, shape, cases, ways (``LIBRARIES``), rounds, seconds, turn: least seconds."""
    dtype, shape = getattr(torch, plan["dtype"]), Shape(**plan["shape"])
    found = progress.found
    found.update(absent={}, cases={}, left_out=[])
    torch.manual_seed(0)
    models: dict[str, Any] = {}
    for name in dict.fromkeys([REFERENCE, *plan["ways"]]):
        why = absence(name, clock.device, dtype)
        if why is not None:
            found["absent"][name] = why
            continue
        own = next((models[other] for other in OURS if other in models), None)
        models[name] = own if own and name in OURS else model_of(name, shape, models, dtype, clock)
    items = [(case, kind) for case in plan["cases"] for kind in KINDS]
    until = time.monotonic() + plan["seconds"]
    for number, (case, kind) in enumerate(items):
        now = time.monotonic()
        if number and now > until:
            found["left_out"].append(f"{case} {kind}")
            continue
        share = (until - now) / (len(items) - number)
        cases = found["cases"].setdefault(case, {"tokens": sum(lengths_of(case))})
        cases[kind] = {}
        measure(case, kind, models, plan, shape, clock, progress, now + share)


def absence(name: str, device: str, dtype: torch.dtype) -> str | None:
    """Why a library is not measured."""
    if name in OURS:
        return None if OURS[name] == FALLBACK else refusal(device, dtype)
    if name == FLASH:
        from transformers.utils import import_utils

        if not import_utils.is_flash_attn_2_available():
            return "flash_attn is not installed"
        if dtype not in (torch.float16, torch.bfloat16):
            return "half precision only"
    return None


def model_of(
    name: str, shape: Shape, models: dict[str, Any], dtype: torch.dtype, clock: Clock
) -> Any:
    """A classifier; its weights are those of the first one made."""
    import transformers

    import xlmr_ext

    config = xlmr_ext.XLMRobertaConfig(
        vocab_size=shape.vocabulary, num_hidden_layers=shape.layers, hidden_size=shape.hidden,
        num_attention_heads=shape.heads, intermediate_size=shape.inner, num_labels=shape.labels,
    )  # fmt: skip
    with torch.device(clock.device):
        if name in OURS:
            model: Any = xlmr_ext.XLMRobertaForSequenceClassification(config)
        else:
            theirs = transformers.XLMRobertaConfig(**config.to_dict())
            theirs._attn_implementation = name.partition(" ")[2]
            model = transformers.XLMRobertaForSequenceClassification(theirs)
            assert model.config._attn_implementation == name.partition(" ")[2]
    model = model.to(dtype)
    for first in models.values():
        model.load_state_dict(first.state_dict(), assign=True)
        break
    return model


def measure(
    case: str, kind: str, models: dict[str, Any], plan: dict[str, Any], shape: Shape, clock: Clock,
    progress: Progress, until: float,
) -> None:  # fmt: skip
    """One case and kind, into the findings."""
    arrays = batch_of(case, shape.vocabulary)
    batch = {
        "input_ids": torch.from_numpy(arrays.input_ids).to(clock.device),
        "attention_mask": torch.from_numpy(arrays.attention_mask).to(clock.device),
    }
    labels = torch.arange(len(arrays.lengths), device=clock.device) % shape.labels
    found = progress.found["cases"][case][kind]
    calls: dict[str, Timed] = {}
    noted = progress.within(f"{case} {kind}", OURS)

    @contextmanager
    def within(name: str) -> Iterator[None]:
        with noted(name):
            yield
        models[name].zero_grad(set_to_none=True)  # gradients of all at once may not fit

    reference = None
    for name, model in models.items():
        progress.running(name, f"{case} {kind}")
        call = call_of(model, batch, labels, kind)
        found[name] = {}
        try:
            with computed_by(OURS.get(name, name)):
                output = output_of(model, batch, labels, kind)
                if name == REFERENCE:
                    reference = output
                if reference is not None:  # it may have found no memory
                    cosine = cosine_of(output, reference)
                    found[name]["cosine"] = cosine
                    if not cosine >= LEAST_COSINE[plan["dtype"]]:
                        found[name]["failed"] = f"its cosine with {REFERENCE} is {cosine:.4f}"
                        continue
                model.train(kind == "training")
                call()  # what is made once, cuBLAS' workspace say, is no memory of the call
                model.zero_grad(set_to_none=True)
                peak = clock.peak_bytes(call)
            found[name]["megabytes"] = None if peak is None else peak / 2**20
            calls[name] = Timed(call, name, within)
        except torch.OutOfMemoryError:
            found[name]["absent"] = "out of memory"
        except Exception as error:
            found[name]["failed"] = f"{type(error).__name__}: {error}"
            clock.check()
        finally:
            model.zero_grad(set_to_none=True)
    for model in models.values():
        model.train(kind == "training")  # the comparison may have ended without dropout
    turns = in_turn(calls, clock, plan["rounds"], plan["turn"], until)
    for name, taken in turns.items():
        found[name].update(milliseconds=quartiles([1e3 * x for x in taken]), turns=taken)
    for name in turns:
        if name != REFERENCE and REFERENCE in turns:
            pairs = zip(turns[REFERENCE], turns[name], strict=True)
            found[name]["faster"] = quartiles([theirs / ours for theirs, ours in pairs])
    progress.write()


def call_of(model: Any, batch: dict[str, Tensor], labels: Tensor, kind: str) -> Callable[[], Any]:
    def forward() -> Any:
        with torch.inference_mode():
            return model(**batch).logits

    def train() -> None:
        model.zero_grad(set_to_none=True)
        model(**batch, labels=labels).loss.backward()

    return train if kind == "training" else forward


def output_of(model: Any, batch: dict[str, Tensor], labels: Tensor, kind: str) -> Tensor:
    """What is compared: logits, or the gradient of one weight, without dropout."""
    model.eval()
    if kind == "forward":
        return call_of(model, batch, labels, kind)().double()  # type: ignore[no-any-return]
    model.zero_grad(set_to_none=True)
    (model(**batch, labels=labels).loss * _LOSS_SCALE).backward()
    weight: Tensor = model.roberta.encoder.layer[0].attention.self.value.weight
    assert weight.grad is not None
    return weight.grad.double()


def cosine_of(ours: Tensor, theirs: Tensor) -> float:
    if ours.shape != theirs.shape:
        return 0.0
    x, y = ours.flatten(), theirs.flatten()
    return float(x @ y / (x.norm() * y.norm()))
