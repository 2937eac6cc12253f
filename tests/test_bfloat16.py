"""Products in bfloat16 on the CPU: the packed weights, the frozen encoder over them, and training
under autocast. What single ops compute is tested in tests/native/bfloat16.cpp."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_frozen import MODELS, check_alone_and_on_threads, inputs_of, make, same
from test_launch_encoder import check_down_refused, shifted, strided, with_data
from torch import Tensor, nn

from xlmr_ext import _C, XLMRobertaForSequenceClassification, _launch, build_info
from xlmr_ext._launch_encoder import PackedWeight, pack_bf16, pack_weight


def rounded(x: Tensor) -> Tensor:
    return x.bfloat16().to(x.dtype)


class RoundedLinear(nn.Module):
    """csrc/ops.h, Bf16Ops, in plain torch."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = rounded(linear.weight.detach()), linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        x = rounded(x) if _C.has_bf16_units() else x
        return nn.functional.linear(x, self.weight, self.bias)


def with_rounded_products(model: Any) -> Any:
    """A copy whose encoder's linear maps round their operands: its layers run unfused."""
    model = copy.deepcopy(model)
    for layer in model.base_model.encoder.layer:
        for name, module in list(layer.named_modules()):
            if isinstance(module, nn.Linear):
                layer.set_submodule(name, RoundedLinear(module))
    return model


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_rounds_operands_and_nothing_else(isa: str, kind: str) -> None:
    """Far nearer to plain torch with rounded operands than that is to the model itself. An operand
    near the middle between two numbers of bfloat16 may still go the other way."""
    if isa == "simt":
        pytest.skip("weights packed in bfloat16 are for tables of processors")
    model, inputs = make(kind), inputs_of(kind)
    wanted = with_rounded_products(model)(**inputs)[0]
    ours = copy.deepcopy(model).optimize_for_inference("bfloat16")(**inputs)[0]
    exact = model(**inputs)[0]
    assert ours.dtype == torch.float32
    real = exact.abs() < 1e6  # an answer's logits at padding are the lowest number there is
    ours, wanted, exact = ours[real], wanted[real], exact[real]
    assert distance(wanted, exact) > 1e-3
    assert distance(ours, wanted) < 0.25 * distance(wanted, exact)


@torch.no_grad()
def test_a_row_is_the_same_alone_and_on_any_number_of_threads(restore_threads: None) -> None:
    check_alone_and_on_threads(make("classifier").optimize_for_inference("bfloat16"))


@torch.no_grad()
def test_one_layout_for_all_tables(tmp_path: Path, every_isa: list[str]) -> None:
    """A file that one table wrote runs on another; tables without units agree with each other."""
    model, inputs = make("classifier"), inputs_of("classifier")
    copy.deepcopy(model).optimize_for_inference("bfloat16").save_frozen(tmp_path)
    for isa in every_isa:
        _launch.set_isa(isa)
        loaded = XLMRobertaForSequenceClassification.from_pretrained(tmp_path)
        own = copy.deepcopy(model).optimize_for_inference("bfloat16")
        same(loaded(**inputs), own(**inputs))


def test_packed_for_any_table() -> None:
    weight = torch.randn(7, 9)
    packed = pack_bf16(weight)
    assert (packed.out_features, packed.in_features, packed.dtype) == (7, 9, torch.bfloat16)
    assert packed.table == "any"
    pairs = packed.data.view(torch.bfloat16).view(16, 32, 2)  # [in / 2, out, 2]
    wanted = torch.zeros(32, 32).index_put((torch.arange(7),), nn.functional.pad(weight, (0, 23)))
    assert torch.equal(pairs.permute(1, 0, 2).reshape(32, 32), wanted.bfloat16())
    assert torch.equal(pack_bf16(weight.t().contiguous().t()).data, packed.data)


@pytest.mark.parametrize(
    ("weight", "error", "match"),
    [
        (None, TypeError, "weight is NoneType; expected a tensor"),
        (torch.ones(2, 3).double(), TypeError, "weight is torch.float64; expected torch.float32"),
        (torch.ones(2), ValueError, r"weight has shape \[2\]; expected two dimensions"),
        (torch.ones(0, 3), ValueError, "out_features is 0; expected at least 1"),
    ],
)
def test_weights_that_cannot_be_packed(weight: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=f"pack_bf16: .*{match}"):
        pack_bf16(weight)


BAD_LAYERS: list[tuple[Callable[[PackedWeight], Any], type[Exception], str]] = [
    (lambda w: pack_weight(torch.zeros(24, 37)), ValueError, "is torch.float32 packed for .*; exp"),
    (lambda w: replace(w, table="avx2"), ValueError, "torch.bfloat16 packed for avx2; expected"),
    (lambda w: with_data(w, lambda d: d[:-1]), ValueError, "'s data has shape"),
    (lambda w: with_data(w, strided), ValueError, "not contiguous and aligned"),
    (lambda w: with_data(w, shifted), ValueError, "not contiguous and aligned"),
]


@pytest.mark.parametrize(("change", "error", "match"), BAD_LAYERS)
def test_layers_that_do_not_fit(
    change: Callable[[PackedWeight], Any], error: type[Exception], match: str
) -> None:
    check_down_refused(pack_bf16, change, error, match)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a float32 model, got torch"):
        make("encoder").double().optimize_for_inference("bfloat16")
    with pytest.raises(ValueError, match="calibration is for dtype='int8', got dtype='bfloat16'"):
        make("encoder").optimize_for_inference("bfloat16", [[0, 5, 2]])
    model = make("encoder").optimize_for_inference("bfloat16")
    assert model.optimize_for_inference("bfloat16") is model.optimize_for_inference()
    with pytest.raises(RuntimeError, match="dtype='float32'"):
        model.optimize_for_inference("float32")
    with pytest.raises(RuntimeError, match="dtype='bfloat16'"):
        make("encoder").optimize_for_inference().optimize_for_inference("bfloat16")


def test_auto_is_what_the_table_is_fast_in(isa: str) -> None:
    wanted = "bfloat16" if _C.has_bf16_units() else "float32"
    assert build_info()["bf16_units"] == _C.has_bf16_units()
    model = make("encoder").optimize_for_inference("auto")
    assert model.encoder.weights == wanted
    assert model.optimize_for_inference("auto") is model
    int8 = make("encoder").optimize_for_inference("int8").optimize_for_inference("auto")
    assert int8.encoder.weights == "int8"
    wide = make("encoder").double().optimize_for_inference("auto")
    assert wide.encoder.weights == "float32"


def test_gradients_under_autocast(isa: str) -> None:
    """Of the whole model in train mode, beside those of float32; the same dropout masks."""
    model, inputs = make("classifier", hidden_dropout_prob=0.1).train(), inputs_of("classifier")
    labels = torch.arange(len(inputs["input_ids"])) % 2
    gradients = []
    for enabled in (False, True):
        model.zero_grad()
        torch.manual_seed(3)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = model(**inputs, labels=labels).loss
        loss.backward()
        assert loss.dtype == torch.float32
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    rounds = _C.has_bf16_units()
    for name, exact in gradients[0].items():
        ours = gradients[1][name]
        assert ours.dtype == torch.float32
        if name.endswith("key.bias"):  # 0 but for rounding: softmax does not see it
            continue
        assert distance(ours, exact) < (0.05 if rounds else 1e-12), name
    assert rounds == any(
        not torch.equal(gradients[1][name], exact) for name, exact in gradients[0].items()
    )
