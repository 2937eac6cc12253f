"""The CUDA kernels in bfloat16 and float16: under the emulator where it is built, and on a GPU.

On the same numbers, a result is held to float64's by the rule of tolerance.py, torch's own path
being that of its operators in the same half precision (``fallback.py``).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import no_cuda_kernels
from samples import OP_NAMES, OpCall, op_calls, results
from test_fallback import classifier, with_wide_statistics
from tolerance import FORWARD, GRADIENT
from torch import Tensor

from xlmr_ext import (
    PackedBatch,
    XLMRobertaForSequenceClassification,
    XLMRobertaTokenizer,
    _launch,
    cuda_support,
    fallback,
)

EMULATED = "simt" in _launch.isas()
NO_GPU = no_cuda_kernels()
SIZES = {"hidden_size": 48, "intermediate_size": 96, "classifier_dropout": 0.0}

kinds = pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16], ids=str)


@pytest.fixture(
    params=[
        pytest.param("simt", marks=pytest.mark.skipif(not EMULATED, reason="built without simt")),
        pytest.param("cuda", marks=pytest.mark.skipif(NO_GPU is not None, reason=str(NO_GPU))),
    ]
)
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The device of tensors that the CUDA kernels compute with."""
    if request.param == "cuda":
        monkeypatch.setattr(cuda_support, "gemm", "native")
        yield "cuda"
        return
    before = _launch.build_info()["table"]
    _launch.set_isa("simt")
    yield "cpu"
    _launch.set_isa(before)


def halved(call: OpCall, kind: torch.dtype) -> OpCall:
    half = call.mapped(lambda x: x.to(kind) if x.is_floating_point() else x)
    return half._replace(args=with_wide_statistics(call, half.args))


@kinds
@pytest.mark.parametrize(
    "sizes",
    [{}, {"lengths": (3, 0, 70, 6), "heads": 2, "head_size": 64, "inner": 96}],
    ids=["small", "tiles"],
)
def test_ops(place: str, kind: torch.dtype, sizes: dict[str, Any]) -> None:
    def placed(x: Tensor) -> Tensor:
        return x if x.dtype == torch.int64 and x.shape == (1,) else x.to(place)  # not the seed

    seen = set()
    for call in op_calls(torch.float32, **sizes):
        half = halved(call, kind)
        exact = half.mapped(lambda x: x.double() if x.is_floating_point() else x).run()
        # With dropout it has other masks, and says nothing.
        by_torch = (
            exact if "dropout" in call.name else results(getattr(fallback, call.op)(*half.args))
        )
        ours = half.mapped(placed).run()
        for index, (got, wanted, other) in enumerate(zip(ours, exact, by_torch, strict=True)):
            if not got.numel():
                continue
            seen.add(call.op)
            assert got.isfinite().all()
            factor = GRADIENT if call.op.endswith("backward") else FORWARD
            torch_error = (other.double() - wanted).abs().max().item()
            bound = factor * torch_error + 4 * torch.finfo(kind).eps * wanted.abs().max().item()
            error = (got.double().cpu() - wanted).abs().max().item()
            assert error <= bound, f"{call.op} ({call.name}), result {index}: {error} > {bound}"
    assert seen == set(OP_NAMES)


@kinds
def test_a_step_of_a_model(place: str, kind: torch.dtype) -> None:
    """Forward, backward and an update, dropout on, a row all masked: near float64's with the same
    masks."""
    ids = torch.randint(2, 61, (4, 9))
    mask = torch.ones_like(ids)
    mask[1, 4:], mask[2] = 0, 0
    found = []
    for dtype, device in ((torch.float64, "cpu"), (kind, place)):
        # Weights that 16 bits hold.
        model = classifier(**SIZES).to(kind).to(dtype).to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)  # AdamW: 1e-8 is 0 in 16 bits
        torch.manual_seed(1)
        labels = torch.tensor([0, 1, 2, 0], device=device)
        out = model(ids.to(device), mask.to(device), labels=labels, output_hidden_states=True)
        assert out.logits.dtype == dtype
        assert not out.hidden_states[-1][2].any()
        out.loss.backward()
        optimizer.step()
        found.append((out.logits, [p.grad for p in model.parameters()]))
        for parameter in model.parameters():
            assert parameter.isfinite().all()
    (wanted, wanted_grads), (got, grads) = found
    eps = torch.finfo(kind).eps
    assert distance(got, wanted) < 6 * eps * wanted.norm()
    # A key's bias moves no softmax: its gradient is 0 but for rounding.
    whole = torch.cat([grad.flatten() for grad in wanted_grads]).norm()
    for one, other in zip(grads, wanted_grads, strict=True):
        assert distance(one, other) < 12 * eps * max(other.norm(), 0.01 * whole)


def distance(got: Tensor, wanted: Tensor) -> Tensor:
    return (got.double().cpu() - wanted).norm()


@pytest.mark.slow
@kinds
def test_real_weights_and_texts_stay_finite(place: str, kind: torch.dtype) -> None:
    if "XLMR_EXT_DATA" not in os.environ:
        pytest.skip("XLMR_EXT_DATA is not set")
    weights = pytest.importorskip("xlmr_ext.demo.weights")
    checkpoint = weights.ensure_checkpoint()
    folder = Path(os.environ["XLMR_EXT_DATA"]) / "sib200"
    texts = [
        line.split("\t")[2]
        for language in sorted(path.parent for path in folder.glob("*/test.tsv"))[:4]
        for line in (language / "test.tsv").read_text("utf-8").split("\n")[1:6]
    ]
    assert len(texts) == 20
    tokenizer = XLMRobertaTokenizer.from_pretrained(checkpoint)
    batch = PackedBatch.from_sequences(tokenizer(texts)["input_ids"], device=place)
    model = XLMRobertaForSequenceClassification.from_pretrained(checkpoint, num_labels=7)
    model = model.to(kind).to(place).train()
    out = model(packed=batch, labels=torch.arange(20, device=place) % 7, output_hidden_states=True)
    assert all(state.isfinite().all() for state in out.hidden_states)
    assert out.loss.isfinite()
    out.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all(), name
