"""Under peft: each method beside the same on transformers' model, and what surrounds training.

More of LoRA is in test_torch_features.py.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import (
    assert_parity,
    make_classifier,
    make_config,
    pad_batch,
    random_ids,
    randomize,
    twin,
)
from tolerance import FORWARD, GRADIENT, assert_same_bits
from torch import Tensor, nn

import xlmr_ext
from xlmr_ext import XLMRobertaForSequenceClassification

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

# peft and older programs ask transformers by the older of two names.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.(is_)?gradient_checkpointing(_enable)?. is deprecated:FutureWarning"
)
LENGTHS = (9, 1, 17, 4)
METHODS: dict[str, Any] = {
    "LoRA": lambda: peft.LoraConfig(task_type="SEQ_CLS", r=3, lora_dropout=0.0),
    "LoRA everywhere": lambda: peft.LoraConfig(
        task_type="SEQ_CLS", r=3, lora_dropout=0.0, target_modules="all-linear"
    ),
    "LoRA of embeddings": lambda: peft.LoraConfig(
        task_type="SEQ_CLS", r=3, lora_dropout=0.0, target_modules=["query", "word_embeddings"]
    ),
    "DoRA": lambda: peft.LoraConfig(
        task_type="SEQ_CLS", r=3, lora_dropout=0.0, use_dora=True, target_modules=["key", "value"]
    ),
    "LoRA with biases": lambda: peft.LoraConfig(
        task_type="SEQ_CLS", r=3, lora_dropout=0.0, bias="lora_only", target_modules=["query"]
    ),
    "IA3": lambda: peft.IA3Config(
        task_type="SEQ_CLS",
        target_modules=["key", "value", "output.dense"],
        feedforward_modules=["output.dense"],
    ),
    "prompt tuning": lambda: peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4),
    "p-tuning": lambda: peft.PromptEncoderConfig(
        task_type="SEQ_CLS", num_virtual_tokens=4, encoder_hidden_size=8
    ),
}


def batch() -> dict[str, Tensor]:
    return {**pad_batch([random_ids(n) for n in LENGTHS]), "labels": torch.arange(4) % 3}


def spread(model: nn.Module) -> nn.Module:
    """Values in what trains: an adapter begins without effect, where half its gradients are 0."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "classifier" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def trainable(model: nn.Module) -> dict[str, Tensor]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("method", METHODS)
def test_as_on_transformers(method: str) -> None:
    """Which parameters train, the logits, and every gradient."""
    model, inputs = make_classifier(), batch()
    wrapped = spread(peft.get_peft_model(copy.deepcopy(model), METHODS[method]()))
    names = trainable(wrapped).keys()
    results, grads = [], []
    for dtype in (None, torch.float64, torch.float32):
        current = wrapped
        if dtype is not None:
            current = peft.get_peft_model(twin(model, torch.float32), METHODS[method]())
            assert trainable(current).keys() == names
            current.load_state_dict(wrapped.state_dict())
            current.to(dtype)
        output = current(**inputs)
        output.loss.backward()
        results.append({"logits": output.logits.detach(), "loss": output.loss.detach()})
        grads.append({n: p.grad for n, p in trainable(current).items()})
    for side in grads:
        assert all(grad is not None for grad in side.values())
    assert_parity(*results, factor=FORWARD)
    assert_parity(*grads, factor=GRADIENT)


def train(model: nn.Module, inputs: dict[str, Tensor], steps: int = 4) -> list[float]:
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=0.05)
    losses = []
    for step in range(steps):
        torch.manual_seed(step)
        loss = model(**inputs).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("method", METHODS)
def test_trained_saved_and_loaded(method: str, tmp_path: Path) -> None:
    model, inputs = make_classifier(), batch()
    wrapped = peft.get_peft_model(copy.deepcopy(model), METHODS[method]())
    losses = train(wrapped, inputs)
    assert losses[-1] < losses[0]
    wrapped.eval()
    trained = wrapped(**inputs).logits
    wrapped.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    assert_same_bits(loaded(**inputs).logits, trained)
    # The same files under transformers' model.
    theirs = peft.PeftModel.from_pretrained(twin(model, torch.float32), tmp_path)
    torch.testing.assert_close(theirs(**inputs).logits, trained, rtol=1e-4, atol=1e-5)
    # peft cannot unload IA3 beside a head of several layers, neither here nor there.
    if "tuning" not in method and method != "IA3":
        merged = loaded.merge_and_unload()
        assert type(merged) is XLMRobertaForSequenceClassification
        torch.testing.assert_close(merged(**inputs).logits, trained, rtol=1e-4, atol=1e-5)
        merged.save_pretrained(tmp_path / "merged")
        again = XLMRobertaForSequenceClassification.from_pretrained(tmp_path / "merged")
        assert_same_bits(again(**inputs).logits, merged(**inputs).logits)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("method", ["LoRA", "LoRA everywhere", "prompt tuning"])
def test_with_activation_checkpointing(method: str, reentrant: bool, when: str) -> None:
    """The same losses, dropout of the model and of the adapter included."""
    runs = []
    inputs = batch()
    model = make_classifier(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    for checkpointing in (False, True):
        current = copy.deepcopy(model)
        config = METHODS[method]()
        if "LoRA" in method:
            config.lora_dropout = 0.1
        torch.manual_seed(1)
        if checkpointing and when == "before":
            current.gradient_checkpointing_enable({"use_reentrant": reentrant})
        wrapped = peft.get_peft_model(current, config)
        if checkpointing and when == "after":
            wrapped.gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert current.is_gradient_checkpointing == checkpointing
        runs.append(train(wrapped.train(), inputs))
    assert runs[0] == runs[1]
    assert runs[0][-1] != runs[0][0]


def test_several_adapters() -> None:
    model, inputs = make_classifier(), batch()
    before = model(**inputs).logits
    config = peft.LoraConfig(r=2, target_modules=["query", "value"])
    wrapped = peft.get_peft_model(model, config, adapter_name="one")
    wrapped.add_adapter("two", config)
    spread(wrapped)
    results = {}
    for name in ("one", "two"):
        wrapped.set_adapter(name)
        spread(wrapped)
        results[name] = wrapped.eval()(**inputs).logits
    assert not torch.allclose(results["one"], results["two"])
    with wrapped.disable_adapter():
        torch.testing.assert_close(wrapped(**inputs).logits, before)
    wrapped.set_adapter("one")
    assert_same_bits(wrapped(**inputs).logits, results["one"])


@pytest.mark.parametrize(
    ("task", "name"),
    [
        ("TOKEN_CLS", "XLMRobertaForTokenClassification"),
        ("QUESTION_ANS", "XLMRobertaForQuestionAnswering"),
        ("FEATURE_EXTRACTION", "XLMRobertaModel"),
    ],
)
def test_other_tasks(task: str, name: str) -> None:
    torch.manual_seed(0)
    labels = 2 if task == "QUESTION_ANS" else 3
    model = randomize(getattr(xlmr_ext, name)(make_config(num_labels=labels))).eval()
    ids = torch.stack([random_ids(6), random_ids(6)])
    targets = {
        "TOKEN_CLS": {"labels": ids % 3},
        "QUESTION_ANS": {
            "start_positions": torch.tensor([1, 2]),
            "end_positions": torch.tensor([4, 2]),
        },
    }.get(task, {})
    outputs = []
    wrapped = spread(
        peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(task_type=task, lora_dropout=0.0))
    )
    theirs = peft.get_peft_model(
        twin(model, torch.float32), peft.LoraConfig(task_type=task, lora_dropout=0.0)
    )
    theirs.load_state_dict(wrapped.state_dict())
    for current in (wrapped, theirs):
        output = current(input_ids=ids, **targets)
        (output.loss if targets else output[0].sum()).backward()
        outputs.append(output[0].detach())
        assert all(p.grad is not None for p in trainable(current).values())
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


def test_prefix_tuning_is_refused() -> None:
    config = peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4)
    wrapped = peft.get_peft_model(make_classifier(), config)
    with pytest.raises(AttributeError, match=r"no past keys and values .* LoRA and prompt tuning"):
        wrapped(**batch())


def test_preparing_for_quantized_training() -> None:
    """Nothing is quantized, so peft does what it does to any float model: freezes it."""
    model = make_classifier()
    prepared = peft.prepare_model_for_kbit_training(model)
    assert prepared is model
    assert not any(p.requires_grad for p in model.parameters())
    assert model.dtype == torch.float32
    assert not model.is_gradient_checkpointing


def test_packed_input_and_compiled() -> None:
    from pairs import pack

    model, texts = make_classifier(), [random_ids(n) for n in LENGTHS]
    wrapped = spread(peft.get_peft_model(model, METHODS["LoRA"]())).eval()
    wanted = wrapped(**pad_batch(texts)).logits
    assert_same_bits(wrapped.base_model(packed=pack(texts)).logits, wanted)
    assert_same_bits(wrapped(packed=pack(texts)).logits, wanted)


def test_inside_trainer(tmp_path: Path) -> None:
    """Checkpoints hold the adapter, and training resumes from one."""
    pytest.importorskip("accelerate")
    inputs = batch()
    rows = [{n: t[i] for n, t in inputs.items()} for i in range(4)]
    model = make_classifier()

    def trainer(output: Path) -> Any:
        torch.manual_seed(0)
        return transformers.Trainer(
            model=peft.get_peft_model(copy.deepcopy(model), METHODS["LoRA"]()),
            args=transformers.TrainingArguments(
                output_dir=str(output),
                per_device_train_batch_size=2,
                num_train_epochs=3,
                learning_rate=0.05,
                save_strategy="epoch",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                gradient_checkpointing=True,
            ),
            train_dataset=rows,
        )

    whole = trainer(tmp_path / "whole")
    assert whole.label_names == ["labels"]
    assert whole.model_accepts_loss_kwargs
    whole.train()
    resumed = trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    for name, value in trainable(whole.model).items():
        torch.testing.assert_close(resumed.model.get_parameter(name), value)
    loaded = peft.PeftModel.from_pretrained(
        copy.deepcopy(model), tmp_path / "whole" / "checkpoint-6"
    )
    whole.model.eval()
    assert_same_bits(loaded(**inputs).logits, whole.model(**inputs).logits)
