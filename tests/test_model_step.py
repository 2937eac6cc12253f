"""A model of two layers, forward, backward and one step of an optimiser, against the reference; and
bad input. On every table, the CUDA kernels' among them, and on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from samples import OPS, cumulative, offset, randn
from tolerance import GRADIENT, assert_close_to_oracle, assert_same_bits, expect
from torch import Tensor

from xlmr_ext import PackedBatch, XLMRobertaConfig, XLMRobertaForTokenClassification, reference
from xlmr_ext.layers import SITE_EMBEDDINGS, layer_sites

LENGTHS = [7, 1, 18, 3]
HEADS, SEED = 3, 5
KINDS = ("word", "position", "token_type")


def make_model(dtype: torch.dtype = torch.float32, **more: Any) -> XLMRobertaForTokenClassification:
    settings: dict[str, Any] = {
        "vocab_size": 31,
        "hidden_size": 30,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "intermediate_size": 45,
        "max_position_embeddings": 24,
        "num_labels": 5,
        "hidden_dropout_prob": 0.2,
        "attention_probs_dropout_prob": 0.2,
        "classifier_dropout": 0.0,
        "initializer_range": 0.3,
    }
    torch.manual_seed(1)
    return XLMRobertaForTokenClassification(XLMRobertaConfig(**{**settings, **more})).to(dtype)


def of_reference(config: XLMRobertaConfig, names: list[str], batch: PackedBatch) -> Callable:
    """The model in train mode as a function of its parameters, by reference.py alone."""
    torch.manual_seed(SEED)
    seed = torch.randint(2**63 - 1, (1,))
    eps, p = config.layer_norm_eps, config.hidden_dropout_prob

    def logits(*parameters: Tensor) -> Tensor:
        of = dict(zip(names, parameters, strict=True))

        def end(x: Tensor, residual: Tensor, name: str, site: int) -> Tensor:
            return reference.residual_layer_norm(
                reference.linear(x, *dense(f"{name}.dense")), residual, *dense(f"{name}.LayerNorm"),
                eps=eps, dropout_p=p, site=site, seed=seed,
            )  # fmt: skip

        def dense(name: str) -> tuple[Tensor, Tensor]:
            return of[f"{name}.weight"], of[f"{name}.bias"]

        tables = "roberta.embeddings."
        x = reference.embedding(
            batch.input_ids, batch.position_ids, None,
            *(of[f"{tables}{kind}_embeddings.weight"] for kind in KINDS),
            *dense(f"{tables}LayerNorm"), eps=eps, padding_idx=1, dropout_p=p,
            site=SITE_EMBEDDINGS, seed=seed,
        )  # fmt: skip
        for index in range(config.num_hidden_layers):
            layer, sites = f"roberta.encoder.layer.{index}.", layer_sites(index)
            qkv = [dense(f"{layer}attention.self.{part}") for part in ("query", "key", "value")]
            context = reference.attention(
                *reference.qkv_linear(x, *zip(*qkv, strict=True)), batch.cu_seqlens,
                batch.max_seqlen, HEADS, dropout_p=config.attention_probs_dropout_prob,
                site=sites[0], seed=seed,
            )  # fmt: skip
            x = end(context, x, f"{layer}attention.output", sites[1])
            inner = reference.linear(x, *dense(f"{layer}intermediate.dense"))
            x = end(reference.activate(inner, "gelu"), x, f"{layer}output", sites[2])
        return reference.linear(x, *dense("classifier"))

    return logits


def step(parameters: list[Tensor], gradients: list[Tensor]) -> None:
    """Of AdamW, with an epsilon that makes it a smooth function of the gradients."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.to(parameter)
    torch.optim.AdamW(parameters, lr=0.02, eps=1.0, weight_decay=0.1).step()


def stepped(parameters: list[Tensor], gradients: list[Tensor | None], dtype: torch.dtype) -> Any:
    after = [p.detach().cpu().to(dtype, copy=True).requires_grad_() for p in parameters]
    step(after, [g for g in gradients if g is not None])
    return [p.detach() for p in after]


def test_two_layers_and_a_step(isa: str, device: str, dtype: torch.dtype) -> None:
    model = make_model(dtype).train()
    names = [name for name, _ in model.named_parameters()]
    batch = PackedBatch.from_sequences([torch.randint(2, 31, (n,)).tolist() for n in LENGTHS])
    function = of_reference(model.config, names, batch)
    before = [p.detach().clone() for p in model.parameters()]
    grad = randn(sum(LENGTHS), 5, dtype=dtype)
    expected = expect(function, *before, grad=grad)

    model.to(device)
    ids = batch.input_ids.split(LENGTHS)
    there = PackedBatch.from_sequences([t.tolist() for t in ids], device=device)
    torch.manual_seed(SEED)
    logits = model(packed=there).logits
    expected.check_result(logits, "logits")
    logits.backward(grad.to(device))
    gradients = [p.grad for p in model.parameters()]
    for index, name in enumerate(names):
        expected.check_grad(index, gradients[index], f"gradient of {name}")

    parameters = list(model.parameters())
    step(parameters, [g for g in gradients if g is not None])
    oracle = stepped(before, expected.oracle_grads, torch.float64)
    torch_path = stepped(before, expected.torch_path_grads, torch.float32)
    # What follows from gradients is held as they are.
    for name, after, *wanted in zip(names, parameters, oracle, torch_path, strict=True):
        assert_close_to_oracle(after.detach(), *wanted, GRADIENT, f"{name} after the step")
    assert all(not torch.equal(p.cpu(), old) for p, old in zip(parameters, before, strict=True))
    torch.manual_seed(SEED)
    with torch.no_grad():
        found, wanted = model(packed=there).logits, (function(*oracle), function(*torch_path))
    assert_close_to_oracle(found, *wanted, GRADIENT, "logits after the step")


# --- Bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]], ids=str)
def test_nothing_to_compute(isa: str, device: str, dtype: torch.dtype, lengths: list[int]) -> None:
    """No text, and texts whose tokens are all padding: finite logits, and gradients of zero."""
    model = make_model(dtype).train().to(device)
    if lengths:
        ids = torch.ones(len(lengths), 6, dtype=torch.int64, device=device)
        logits = model(ids, attention_mask=torch.zeros_like(ids)).logits
    else:
        batch = PackedBatch.from_sequences([], device=device)
        logits = model(packed=batch).logits
    logits.sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not name.startswith("classifier"):
            assert not parameter.grad.any(), name
    assert logits.isfinite().all()


def test_ids_out_of_range(isa: str, device: str, dtype: torch.dtype) -> None:
    """The host looks at ids where it can; a GPU gives a row of NaN, and the others stay right."""
    hidden = 8
    tables = [randn(n, hidden, dtype=dtype, device=device) for n in (5, 4, 2)]
    weight, bias = (randn(hidden, dtype=dtype, device=device) for _ in range(2))
    places = torch.zeros(4, dtype=torch.int64, device=device)
    for bad in (5, -1, 2**40):
        ids = torch.tensor([1, bad, 4, 0], device=device)
        given = (ids, None, places, None, *tables, weight, bias, 1e-5, 0.0, 0, None)
        if device == "cpu":
            with pytest.raises(ValueError, match=rf"input_ids holds {bad}; expected 0 to 4"):
                OPS.embedding_forward(*given)
            continue
        y, *_ = OPS.embedding_forward(*given)
        assert y[1].isnan().all()
        assert y[[0, 2, 3]].isfinite().all()


def test_parameters_at_any_address(isa: str, device: str, dtype: torch.dtype) -> None:
    """A parameter may be a view into a file or a buffer, aligned to its element and no more."""
    model = make_model(dtype).eval().to(device)
    x = randn(2, 9, 30, dtype=dtype, device=device)
    wanted = model(inputs_embeds=x).logits
    for parameter in model.parameters():
        parameter.data = offset(parameter.data)
        assert parameter.data_ptr() % 16 != 0
    found = model(inputs_embeds=offset(x)).logits
    assert_same_bits(found.detach(), wanted.detach())
    grads = []
    for logits in (wanted, found):
        model.zero_grad()
        logits.sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for got, expected in zip(*grads, strict=True):
        assert_same_bits(got, expected)


def test_a_strided_view_of_no_rows(isa: str, device: str, dtype: torch.dtype) -> None:
    wide = randn(6, 40, dtype=dtype, device=device)
    none = wide[3:3, ::5]
    out, lse = OPS.attention_forward(
        none, none, none, cumulative([0, 0], device), 0, 2, 0.5, 0.0, 0, None
    )
    assert out.shape == (0, 8)
    assert lse.shape == (2, 0)
