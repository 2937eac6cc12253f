"""What works on any module works here: compile, hooks, parametrizations, PEFT, copies, autocast."""

from __future__ import annotations

import copy
import io
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import (
    assert_parity,
    gradients,
    make_classifier,
    make_encoder,
    pack,
    pad_batch,
    random_ids,
    twin,
)
from tolerance import FORWARD, GRADIENT, assert_same_bits
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from xlmr_ext import _C, PackedBatch, XLMRobertaForSequenceClassification, ops
from xlmr_ext.layers import ResidualOutput

Classifier = XLMRobertaForSequenceClassification


def batch(count: int = 4) -> dict[str, Tensor]:
    inputs = pad_batch([random_ids(n) for n in (9, 1, 17, 4, 12, 6, 3)[:count]])
    return {**inputs, "labels": torch.arange(count) % 3}


# --- torch.compile --------------------------------------------------------------------------------

# What torch's own compiler warns of is not ours to mend.
compiling = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning",
                                       "ignore::UserWarning")  # fmt: skip


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def backend_or_skip(backend: str) -> str:
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler")
    return backend


def packed_of(*lengths: int) -> PackedBatch:
    return pack([random_ids(n) for n in lengths])


@compiling
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_packed_input_compiles_whole(backend: str, fresh_compiler: None) -> None:
    model = make_classifier(num_hidden_layers=1)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend_or_skip(backend))
    for lengths in [(5, 3, 9), (7, 2), (4, 17, 1, 30), (6, 6)]:
        packed = packed_of(*lengths)
        with torch.no_grad():
            wanted = model(packed=packed).logits
            torch.testing.assert_close(compiled(packed=packed).logits, wanted)


@compiling
def test_other_sizes_are_not_compiled_again(fresh_compiler: None) -> None:
    model = make_classifier(num_hidden_layers=1)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for lengths in [(5, 3, 9), (7, 2, 3, 4)]:
            compiled(packed=packed_of(*lengths))
        with torch.compiler.set_stance("fail_on_recompile"):
            for lengths in [(4, 17, 1, 30, 2), (6, 38), (2, 5, 8)]:
                packed = packed_of(*lengths)
                wanted = model(packed=packed).logits
                torch.testing.assert_close(compiled(packed=packed).logits, wanted)


@compiling
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_training_step_compiles(backend: str, fresh_compiler: None) -> None:
    model = make_classifier(num_hidden_layers=1).train()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend_or_skip(backend))
    for lengths in [(5, 3, 9), (7, 2, 3, 4)]:
        packed, labels = packed_of(*lengths), torch.arange(len(lengths)) % 3
        runs = []
        for function in (model, compiled):
            model.zero_grad()
            output = function(packed=packed, labels=labels)
            output.loss.backward()
            grads = {name: grad.clone() for name, grad in gradients(model).items()}
            runs.append({"loss": output.loss.detach(), **grads})
        for name, wanted in runs[0].items():
            torch.testing.assert_close(runs[1][name], wanted, msg=lambda m, n=name: f"{n}: {m}")


@compiling
def test_dropout_compiles(fresh_compiler: None) -> None:
    model = make_classifier(
        num_hidden_layers=1, hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3
    ).train()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    packed = packed_of(5, 3, 9)
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        model.zero_grad()
        loss = compiled(packed=packed, labels=torch.tensor([0, 1, 2])).loss
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == losses[1] != losses[2]
    assert compiled(packed=packed).logits.ne(compiled(packed=packed).logits).any()


@compiling
def test_padded_input_works_compiled(fresh_compiler: None) -> None:
    """It breaks at packing."""
    model = make_classifier(num_hidden_layers=1).train()
    compiled = torch.compile(model, dynamic=True, backend="aot_eager")
    for count in (4, 7, 3):
        inputs = batch(count)
        runs = []
        for function in (model, compiled):
            model.zero_grad()
            output = function(**inputs)
            output.loss.backward()
            runs.append({"logits": output.logits.detach(), "loss": output.loss.detach()})
            runs[-1].update((n, g.clone()) for n, g in gradients(model).items())
        for name, wanted in runs[0].items():
            torch.testing.assert_close(runs[1][name], wanted, msg=lambda m, n=name: f"{n}: {m}")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits)
    ids = torch.tensor([[0, 5, 61]])
    with pytest.raises(ValueError, match="input_ids holds 61"):
        compiled(ids)


@compiling
def test_padded_input_is_one_graph_after_packing(fresh_compiler: None) -> None:
    model = make_encoder()
    explained = torch._dynamo.explain(model)(random_ids(5)[None])
    assert explained.graph_count == 1, explained.break_reasons
    called = {str(op) for ops in explained.ops_per_graph for op in ops}
    assert called, "nothing was compiled"


@compiling
def test_the_encoder_compiles_with_hidden_states(fresh_compiler: None) -> None:
    model = make_encoder(num_hidden_layers=1)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    packed = packed_of(5, 3)
    ours = compiled(packed=packed, output_hidden_states=True)
    wanted = model(packed=packed, output_hidden_states=True)
    torch.testing.assert_close(ours.pooler_output, wanted.pooler_output)
    assert len(ours.hidden_states) == 2
    for value, right in zip(ours.hidden_states, wanted.hidden_states, strict=True):
        torch.testing.assert_close(value, right)


@compiling
def test_hooks_count_when_compiled(fresh_compiler: None) -> None:
    model = make_classifier(num_hidden_layers=1)
    packed = packed_of(5, 3)
    before = model(packed=packed).logits
    dense = model.get_submodule("roberta.encoder.layer.0.intermediate.dense")
    dense.register_forward_hook(lambda module, args, out: out * 1.5)
    compiled = torch.compile(model, dynamic=True, backend="aot_eager")
    wanted = model(packed=packed).logits
    assert not close(wanted, before)
    torch.testing.assert_close(compiled(packed=packed).logits, wanted)


# --- Modes and copies -----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_without_gradients(isa: str, mode: Callable[[], Any]) -> None:
    model, inputs = make_classifier(), batch()
    wanted = model(**inputs)
    assert wanted.logits.requires_grad
    with mode():
        output = model(**inputs)
        inside = {name: value.clone() for name, value in inputs.items()}
        assert_same_bits(model(**inside).logits, wanted.logits)
    assert not output.logits.requires_grad
    assert not output.loss.requires_grad
    assert output.logits.is_inference() == (mode is torch.inference_mode)
    assert_same_bits(output.logits, wanted.logits)
    assert_same_bits(output.loss, wanted.loss)


def test_deepcopy_pickle_and_save() -> None:
    model, inputs = make_classifier(), batch()
    wanted = model(**inputs).logits
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    copies = {
        "deepcopy": copy.deepcopy(model),
        "pickle": pickle.loads(pickle.dumps(model)),
        "torch.save": torch.load(saved, weights_only=False),
    }
    for what, other in copies.items():
        assert_same_bits(other(**inputs).logits, wanted, what)
        assert other.config == model.config
        # It is a copy: changing it leaves the model.
        other(**inputs).loss.backward()
        with torch.no_grad():
            other.classifier.out_proj.weight.zero_()
        assert not torch.equal(other(**inputs).logits, wanted), what
        assert_same_bits(model(**inputs).logits, wanted, f"after changing the {what}")
        assert model.classifier.out_proj.weight.grad is None


@pytest.mark.parametrize("positions", ["absolute", "sinusoidal"])
def test_state_dicts(positions: str) -> None:
    first = make_classifier(position_embedding_type=positions)
    second = make_classifier(position_embedding_type=positions)
    inputs = batch()
    assert not torch.equal(first(**inputs).logits, second(**inputs).logits)
    saved = io.BytesIO()
    torch.save(first.state_dict(), saved)
    saved.seek(0)
    state = torch.load(saved, weights_only=True)
    assert list(second.load_state_dict(state)) == [[], []]
    assert_same_bits(first(**inputs).logits, second(**inputs).logits)
    del state["classifier.dense.bias"]
    with pytest.raises(RuntimeError, match=r"classifier\.dense\.bias"):
        second.load_state_dict(state)


def test_outputs_can_be_pickled_and_mapped() -> None:
    output = make_classifier()(**batch(), output_hidden_states=True)
    with torch.no_grad():
        doubled = torch.utils._pytree.tree_map(lambda t: t.detach() * 2, output)
    assert type(doubled) is type(output)
    assert_same_bits(doubled.hidden_states[1], output.hidden_states[1].detach() * 2)
    back = pickle.loads(pickle.dumps(doubled))
    assert_same_bits(back.logits, doubled.logits)


def test_parameters_can_be_replaced_for_one_call() -> None:
    """torch.func.functional_call, as meta-learning and ensembles use it."""
    first, second = make_classifier(), make_classifier()
    inputs = batch()
    output = torch.func.functional_call(first, dict(second.named_parameters()), (), inputs)
    assert_same_bits(output.logits, second(**inputs).logits)


def test_frozen_parameters_get_no_gradient() -> None:
    model = make_classifier()
    inputs = batch()
    model(**inputs).loss.backward()
    wanted = {name: grad.clone() for name, grad in gradients(model).items()}
    for chosen in ["classifier", "layer.1", "query.bias", "LayerNorm.weight", "dense.weight"]:
        model.zero_grad()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(chosen in name)
        model(**inputs).loss.backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == (chosen in name), name
            if parameter.grad is not None:
                assert_same_bits(parameter.grad, wanted[name], f"{name}, only {chosen}")


def test_gradients_add_up() -> None:
    model, inputs = make_classifier(), batch()
    model(**inputs).loss.backward()
    once = {name: grad.clone() for name, grad in gradients(model).items()}
    model(**inputs).loss.backward()
    for name, grad in gradients(model).items():
        assert_same_bits(grad, once[name] * 2, name)


def test_expanded_gradients(isa: str) -> None:
    """As sum() hands them back, with strides of zero."""
    classifier, encoder, inputs = make_classifier(), make_encoder(), batch()
    del inputs["labels"]
    results = [(classifier, "logits"), (encoder, "last_hidden_state"), (encoder, "pooler_output")]
    for model, name in results:
        runs = []
        for grad in ("expanded", "whole"):
            model.zero_grad()
            value = model(**inputs)[name]
            whole = torch.ones_like(value)
            value.backward(torch.ones(()).expand_as(value) if grad == "expanded" else whole)
            runs.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        assert runs[0].keys() == runs[1].keys()
        for n, grad in runs[0].items():
            assert_same_bits(grad, runs[1][n], f"{name}: {n}")


def test_a_second_derivative_is_refused() -> None:
    model = make_classifier()
    loss = model(**batch()).loss
    (grad,) = torch.autograd.grad(loss, model.classifier.dense.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# --- Hooks and replaced modules -------------------------------------------------------------------

LINEARS = [
    "roberta.encoder.layer.0.attention.self.query",
    "roberta.encoder.layer.1.attention.self.key",
    "roberta.encoder.layer.0.attention.self.value",
    "roberta.encoder.layer.1.attention.output.dense",
    "roberta.encoder.layer.0.intermediate.dense",
    "roberta.encoder.layer.1.output.dense",
    "classifier.dense",
    "classifier.out_proj",
]
OTHERS = [
    "roberta",
    "roberta.embeddings",
    "roberta.embeddings.word_embeddings",
    "roberta.embeddings.position_embeddings",
    "roberta.embeddings.token_type_embeddings",
    "roberta.embeddings.LayerNorm",
    "roberta.encoder",
    "roberta.encoder.layer.0",
    "roberta.encoder.layer.1.attention",
    "roberta.encoder.layer.0.attention.self",
    "roberta.encoder.layer.1.attention.output",
    "roberta.encoder.layer.0.attention.output.LayerNorm",
    "roberta.encoder.layer.0.intermediate",
    "roberta.encoder.layer.1.output",
    "roberta.encoder.layer.0.output.LayerNorm",
    "classifier",
    "classifier.dropout",
]


def close(actual: Tensor, wanted: Tensor) -> bool:
    return torch.allclose(actual, wanted, rtol=1e-4, atol=1e-5)


def scaled(output: Any) -> Any:
    """The first tensor inside 1.5 times as large."""
    if isinstance(output, Tensor):
        return output * 1.5
    if isinstance(output, tuple):
        return (scaled(output[0]), *output[1:])
    output.last_hidden_state = output.last_hidden_state * 1.5
    return output


@pytest.mark.parametrize("name", LINEARS + OTHERS)
def test_every_module_runs_its_hooks(name: str) -> None:
    """Forward and pre-hooks are called and what they return counts; removed, they are gone."""
    model, inputs = make_classifier(), batch()
    module = model.get_submodule(name)
    wanted = model(**inputs)
    calls: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_: calls.append("forward")),
        module.register_forward_pre_hook(lambda *_: calls.append("pre")),
    ]
    seen = model(**inputs)
    assert calls[:2] == ["pre", "forward"]
    assert close(seen.logits, wanted.logits), "watching changed the result"
    handles.append(module.register_forward_hook(lambda module, args, out: scaled(out)))
    changed = model(**inputs)
    assert not close(changed.logits, wanted.logits), "what the hook returned was dropped"
    changed.loss.backward()
    for handle in handles:
        handle.remove()
    assert_same_bits(model(**inputs).logits, wanted.logits)


# Torch's remark for a module whose inputs are ids.
@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize("name", [n for n in LINEARS + OTHERS if n != "roberta"])
def test_every_module_runs_its_backward_hooks(name: str) -> None:
    model, inputs = make_classifier(), batch()
    model(**inputs).loss.backward()
    wanted = {n: g.clone() for n, g in gradients(model).items()}
    model.zero_grad()
    seen: list[Any] = []
    handle = model.get_submodule(name).register_full_backward_hook(
        lambda module, grad_in, grad_out: seen.append(grad_out)
    )
    model(**inputs).loss.backward()
    assert len(seen) >= 1
    assert seen[0][0] is not None
    for n, grad in gradients(model).items():
        assert close(grad, wanted[n]), n
    handle.remove()


@pytest.mark.parametrize("name", LINEARS)
def test_a_hook_on_a_linear_sees_and_changes_what_it_says(name: str) -> None:
    """Against the same change made in the weights."""
    model, inputs = make_classifier(), batch()
    other = copy.deepcopy(model)
    linear, twin_of_it = model.get_submodule(name), other.get_submodule(name)
    with torch.no_grad():
        twin_of_it.weight *= 1.25
        twin_of_it.bias.mul_(1.25)
    shapes = []

    def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        shapes.append((args[0].shape[-1], out.shape[-1]))
        return out * 1.25

    linear.register_forward_hook(hook)
    output, wanted = model(**inputs), other(**inputs)
    assert shapes == [(linear.in_features, linear.out_features)]
    torch.testing.assert_close(output.logits, wanted.logits)
    output.loss.backward()
    wanted.loss.backward()
    torch.testing.assert_close(linear.weight.grad, twin_of_it.weight.grad * 1.25)
    pre = linear.register_forward_pre_hook(lambda module, args: (args[0] * 0,))
    zeroed = model(**inputs).logits
    pre.remove()
    assert not close(zeroed, output.logits)


def test_a_backward_hook_changes_the_gradient() -> None:
    model, inputs = make_classifier(), batch()
    dense = model.roberta.encoder.layer[0].intermediate.dense
    dense.register_full_backward_hook(lambda m, grad_in, grad_out: (torch.zeros_like(grad_in[0]),))
    first = model.roberta.encoder.layer[0].attention.output.LayerNorm
    model(**inputs).loss.backward()
    with_zero = first.weight.grad.clone()
    dense._backward_hooks.clear()
    model.zero_grad()
    model(**inputs).loss.backward()
    assert not close(with_zero, first.weight.grad)


def test_global_hooks_see_every_linear() -> None:
    model, inputs = make_classifier(), batch()
    wanted = model(**inputs).logits
    names = {id(module): name for name, module in model.named_modules()}
    seen: set[str] = set()
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, out: seen.add(names.get(id(module), "?"))
    )
    try:
        assert close(model(**inputs).logits, wanted)
    finally:
        handle.remove()
    assert set(LINEARS) <= seen
    assert {n for n in OTHERS if n != "roberta.encoder.layer"} <= seen


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


@pytest.mark.parametrize("name", LINEARS)
@pytest.mark.parametrize("which", ["weight", "bias"])
def test_parametrizations_take_effect(name: str, which: str) -> None:
    model, inputs = make_classifier(), batch()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_submodule(name).get_parameter(which).mul_(2)
    linear = model.get_submodule(name)
    nn.utils.parametrize.register_parametrization(linear, which, Doubled())
    output, wanted = model(**inputs), other(**inputs)
    torch.testing.assert_close(output.logits, wanted.logits)
    output.loss.backward()
    wanted.loss.backward()
    original = linear.parametrizations[which].original
    torch.testing.assert_close(
        original.grad, other.get_submodule(name).get_parameter(which).grad * 2
    )
    nn.utils.parametrize.remove_parametrizations(linear, which)
    torch.testing.assert_close(model(**inputs).logits, wanted.logits)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("name", LINEARS)
def test_the_older_weight_norm_takes_effect(name: str) -> None:
    model, inputs = make_classifier(), batch()
    wanted = model(**inputs).logits
    linear = model.get_submodule(name)
    nn.utils.weight_norm(linear)
    assert close(model(**inputs).logits, wanted)
    with torch.no_grad():
        linear.weight_g.mul_(3)
    output = model(**inputs)
    assert not close(output.logits, wanted)
    output.loss.backward()
    assert linear.weight_g.grad.abs().sum() > 0
    assert linear.weight_v.grad.abs().sum() > 0


@pytest.mark.parametrize("name", LINEARS)
def test_pruning_takes_effect(name: str) -> None:
    from torch.nn.utils import prune

    model, inputs = make_classifier(), batch()
    other = copy.deepcopy(model)
    mask = torch.rand(model.get_submodule(name).weight.shape) < 0.5
    prune.custom_from_mask(model.get_submodule(name), "weight", mask)
    with torch.no_grad():
        other.get_submodule(name).weight.mul_(mask)
    torch.testing.assert_close(model(**inputs).logits, other(**inputs).logits)


@pytest.mark.parametrize("name", LINEARS)
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_can_be_replaced(name: str, bias: bool) -> None:
    model, inputs = make_classifier(), batch()
    old = model.get_submodule(name)
    other = copy.deepcopy(model)
    new = nn.Linear(old.in_features, old.out_features, bias=bias)
    model.set_submodule(name, new)
    with torch.no_grad():
        other.get_submodule(name).weight.copy_(new.weight)
        other.get_submodule(name).bias.copy_(new.bias if new.bias is not None else 0)
    output = model(**inputs)
    torch.testing.assert_close(output.logits, other(**inputs).logits)
    output.loss.backward()
    assert new.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", LINEARS)
def test_a_bias_can_be_taken_away(name: str) -> None:
    model, inputs = make_classifier(), batch()
    linear = model.get_submodule(name)
    with torch.no_grad():
        linear.bias.zero_()
    wanted = model(**inputs).logits
    linear.bias = None
    output = model(**inputs)
    torch.testing.assert_close(output.logits, wanted)
    output.loss.backward()
    assert linear.weight.grad.abs().sum() > 0


def test_all_biases_can_be_taken_away() -> None:
    model, inputs = make_classifier(), batch()
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert len(linears) == 14
    with torch.no_grad():
        for linear in linears:
            linear.bias.zero_()
    wanted = model(**inputs).logits
    for linear in linears:
        linear.bias = None
    output = model(**inputs)
    torch.testing.assert_close(output.logits, wanted)
    output.loss.backward()
    assert all(linear.weight.grad.any() for linear in linears)


def test_a_forward_put_on_the_instance_counts() -> None:
    """As some libraries do it."""
    model, inputs = make_classifier(), batch()
    wanted = model(**inputs).logits
    for name in [n for n in LINEARS + OTHERS if "embeddings" not in n and n != "roberta"]:
        module = model.get_submodule(name)
        plain = module.forward
        module.forward = lambda *a, plain=plain, **k: scaled(plain(*a, **k))
        assert not close(model(**inputs).logits, wanted), name
        del module.forward
    assert_same_bits(model(**inputs).logits, wanted)


def test_layer_norm_and_embeddings_can_be_replaced() -> None:
    model, inputs = make_classifier(), batch()
    wanted = model(**inputs).logits
    names = [n for n in OTHERS if n.rpartition(".")[2] in ("LayerNorm",) or "_embeddings" in n]
    assert len(names) == 6
    for name in names:
        broken = copy.deepcopy(model)
        broken.set_submodule(name, nn.Sequential(copy.deepcopy(model.get_submodule(name))))
        assert close(broken(**inputs).logits, wanted), name
        broken.set_submodule(
            name, nn.Sequential(copy.deepcopy(model.get_submodule(name)), nn.Tanh())
        )
        assert not close(broken(**inputs).logits, wanted), name


def test_an_embedding_without_a_padding_row() -> None:
    """No row of it is without gradient."""
    model, inputs = make_classifier(), batch()
    words = nn.Embedding(61, 24)
    model.set_input_embeddings(words)
    inputs["input_ids"][0, 3] = 1
    model(**inputs).loss.backward()
    assert words.weight.grad is not None
    assert words.weight.grad[5].any() == (inputs["input_ids"] == 5).any()
    assert words.weight.grad[1].any()


def test_an_embedding_with_a_largest_norm() -> None:
    model, inputs = make_classifier(), batch()
    words = nn.Embedding(61, 24, max_norm=0.5)
    bounded = words.weight.detach().clone()
    bounded *= (0.5 / (bounded.norm(dim=1, keepdim=True) + 1e-7)).clamp(max=1.0)
    model.set_input_embeddings(nn.Embedding.from_pretrained(bounded))
    wanted = model(**inputs).logits
    model.set_input_embeddings(words)
    assert close(model(**inputs).logits, wanted)


# --- PEFT -----------------------------------------------------------------------------------------


def lora(model: nn.Module, **settings: Any) -> nn.Module:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, lora_alpha=6, lora_dropout=0.0, **settings)
    return peft.get_peft_model(model, config)


def randomize_lora(model: nn.Module) -> None:
    """B starts at zero, where the gradient of A is zero."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, 0.0, 0.3)


third_party = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)


@third_party
@pytest.mark.parametrize("targets", [["query", "value"], ["query", "key", "value", "dense"]])
def test_lora_trains(targets: list[str]) -> None:
    model = make_classifier()
    inputs = batch()
    before = model(**inputs).logits
    wrapped = lora(model, target_modules=targets)
    assert close(wrapped(**inputs).logits, before), "an untrained adapter changes nothing"
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(5):
        loss = wrapped(**inputs).loss
        losses.append(loss.item())
        loss.backward()
        reached = {n for n, p in wrapped.named_parameters() if p.grad is not None}
        assert reached == {n for n, _ in wrapped.named_parameters() if "lora_" in n}
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    trained = wrapped(**inputs).logits
    assert not close(trained, before)
    with wrapped.disable_adapter():
        assert close(wrapped(**inputs).logits, before)
    merged = wrapped.merge_and_unload()
    assert isinstance(merged, Classifier)
    assert close(merged(**inputs).logits, trained)


@third_party
@pytest.mark.parametrize("targets", [["query", "value"], ["query", "key", "value", "dense"]])
def test_lora_is_as_with_transformers(targets: list[str]) -> None:
    pytest.importorskip("transformers")
    model = make_classifier()
    wrapped = lora(copy.deepcopy(model), target_modules=targets)
    randomize_lora(wrapped)
    inputs = batch()
    results, grads = [], []
    for dtype in (None, torch.float64, torch.float32):
        current = wrapped
        if dtype is not None:
            current = lora(twin(model, torch.float32), target_modules=targets)
            current.load_state_dict(wrapped.state_dict())
            current.to(dtype)
        output = current(**inputs)
        output.loss.backward()
        results.append({"logits": output.logits.detach(), "loss": output.loss.detach()})
        grads.append({n: p.grad for n, p in current.named_parameters() if p.grad is not None})
    assert_parity(*results, factor=FORWARD)
    assert_parity(*grads, factor=GRADIENT)


@third_party
def test_lora_for_sequence_classification(tmp_path: Path) -> None:
    """The task type of the tutorials: the head trains too; saved and loaded again."""
    peft = pytest.importorskip("peft")
    model = make_classifier()
    wrapped = lora(copy.deepcopy(model), task_type="SEQ_CLS", target_modules=["query", "value"])
    inputs = batch()
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        wrapped(**inputs).loss.backward()
        reached = {n for n, p in wrapped.named_parameters() if p.grad is not None}
        assert all("lora_" in n or "classifier" in n for n in reached)
        assert any("classifier" in n for n in reached)
        assert any("lora_" in n for n in reached)
        optimizer.step()
        optimizer.zero_grad()
    wrapped.eval()
    trained = wrapped(**inputs).logits
    assert not close(trained, model(**inputs).logits)
    wrapped.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    assert_same_bits(loaded(**inputs).logits, trained)


# --- Types, checkpointing -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_autocast(kind: torch.dtype) -> None:
    """Returns float32, and computes in it but for the operands of products."""
    rounds = kind == torch.bfloat16 and _C.has_bf16_units()
    near = {"rtol": 0.1, "atol": 0.05} if rounds else {}
    model, inputs = make_classifier().train(), batch()
    wanted = model(**inputs)
    wanted.loss.backward()
    grads = {name: grad.clone() for name, grad in gradients(model).items()}
    model.zero_grad()
    with torch.autocast("cpu", dtype=kind):
        output = model(**inputs, output_hidden_states=True)
    assert output.logits.dtype == torch.float32
    assert all(h.dtype == torch.float32 for h in output.hidden_states)
    torch.testing.assert_close(output.logits, wanted.logits, **near)
    torch.testing.assert_close(output.loss, wanted.loss, **near)
    output.loss.backward()
    for name, grad in gradients(model).items():
        assert grad.dtype == torch.float32
        torch.testing.assert_close(grad, grads[name], **near, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_autocast_with_modules_of_torch_inside(kind: torch.dtype) -> None:
    """Replaced and hooked modules compute in 16 bits; the rest takes it up in float32."""
    model, inputs = make_classifier(), batch()
    wanted = model(**inputs).logits
    for name in LINEARS[:6]:
        old = model.get_submodule(name)
        new = nn.Linear(old.in_features, old.out_features)
        new.load_state_dict(old.state_dict())
        model.set_submodule(name, new)
    with torch.autocast("cpu", dtype=kind):
        output = model(**inputs)
    assert output.logits.dtype == torch.float32
    torch.testing.assert_close(output.logits, wanted, rtol=0.1, atol=0.1)
    output.loss.backward()
    for name, grad in gradients(model).items():
        assert grad.isfinite().all(), name


def test_autocast_of_a_half_precision_model() -> None:
    """What the sentence for such a model advises."""
    model, inputs = make_classifier(), batch()
    wanted = model(**inputs).logits
    model.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**inputs)
    assert output.logits.dtype == torch.float32
    torch.testing.assert_close(output.logits, wanted, rtol=0.2, atol=0.2)
    output.loss.backward()
    assert all(grad.dtype == torch.bfloat16 for grad in gradients(model).values())


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(reentrant: bool) -> None:
    model = make_classifier(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2).train()
    # A layer whose forward was replaced goes on with all rows; so must the one it is held to.
    inputs: dict[str, Any] = {**batch(), "output_hidden_states": True}
    torch.manual_seed(4)
    plain = model(**inputs)
    plain.loss.backward()
    wanted = {name: grad.clone() for name, grad in gradients(model).items()}
    model.zero_grad()
    for layer in model.roberta.encoder.layer:
        layer.forward = lambda *args, run=layer.forward: checkpoint(
            run, *args, use_reentrant=reentrant
        )
    torch.manual_seed(4)
    output = model(**inputs)
    assert_same_bits(output.loss, plain.loss)
    output.loss.backward()
    for name, grad in gradients(model).items():
        assert_same_bits(grad, wanted[name], name)


class _Adapter(ResidualOutput):
    """A block's end that adds something of its own."""

    def forward(self, x: Tensor, residual: Tensor, dropout: Any, site: int) -> Tensor:
        return super().forward(x, residual, dropout, site) + 1.0


def test_a_replaced_block_is_not_run_past() -> None:
    model = make_classifier()
    inputs = batch()
    plain = model(**inputs).logits
    layer = model.roberta.encoder.layer[0]
    adapter = _Adapter(model.config.intermediate_size, model.config)
    adapter.load_state_dict(layer.output.state_dict())
    layer.output = adapter
    assert not torch.allclose(model(**inputs).logits, plain)


def test_a_part_in_eval_mode_drops_nothing() -> None:
    model = make_classifier(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    inputs = batch()
    wanted = model(**inputs).logits
    model.train()
    assert not torch.equal(model(**inputs).logits, wanted)
    model.roberta.embeddings.eval()
    model.roberta.encoder.eval()
    model.classifier.eval()
    assert_same_bits(model(**inputs).logits, wanted, "all parts in eval mode")


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_is_kept(
    mode: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[bool] = []
    for name, at in (("feed_forward_forward", 8), ("layer_norm_forward", 8)):
        whole = getattr(ops, name)

        def spy(*args: Any, whole: Any = whole, at: int = at) -> Any:
            saved.append(args[at])
            return whole(*args)

        monkeypatch.setattr(ops, name, spy)
    model, inputs = make_classifier(), batch()
    with mode():
        model(**inputs)
    assert saved
    assert not any(saved)
    saved.clear()
    model(**inputs)
    assert saved
    assert all(saved)
