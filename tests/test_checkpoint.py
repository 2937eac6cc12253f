"""PreTrainedModel: loading, saving, names, labels, shapes, types, initialisation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_models import (
    HEAD,
    SIZES,
    Base,
    Classifier,
    checkpoint,
    classifier,
    digest,
    mapped_from,
    same,
)
from torch import Tensor, nn

from xlmr_ext.configuration import XLMRobertaConfig
from xlmr_ext.pretrained import PreTrainedModel

# --- saving and loading -----------------------------------------------------------------------


def test_round_trip(tmp_path: Path) -> None:
    model = classifier(id2label={0: "a", 1: "b", 2: "c"})
    model.save_pretrained(tmp_path / "deep" / "er")
    files = sorted(p.name for p in (tmp_path / "deep" / "er").iterdir())
    assert files == ["config.json", "model.safetensors"]
    random_state = torch.get_rng_state()
    loaded, info = Classifier.from_pretrained(tmp_path / "deep" / "er", output_loading_info=True)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert info == {
        "missing_keys": [],
        "unexpected_keys": [],
        "mismatched_keys": [],
        "error_msgs": [],
    }
    assert same(loaded, model)
    assert loaded.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert not loaded.training
    assert not any(module.training for module in loaded.modules())
    assert all(p.requires_grad and p.device.type == "cpu" for p in loaded.parameters())
    assert torch.equal(loaded.roberta.embeddings.position_ids, torch.arange(5))
    assert (loaded.dtype, loaded.device) == (torch.float32, torch.device("cpu"))


def test_transformers_loads_what_is_saved(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    transformers = pytest.importorskip("transformers")
    model = classifier()
    model.save_pretrained(tmp_path)
    theirs, info = transformers.XLMRobertaForSequenceClassification.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert {name: len(found) for name, found in info.items()} == dict.fromkeys(info, 0)
    assert "initialized" not in capfd.readouterr().err.lower()
    ours, others = model.state_dict(), theirs.state_dict()
    assert ours.keys() == others.keys()
    assert all(torch.equal(ours[name], others[name]) for name in ours)
    auto = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(auto).__name__ == "XLMRobertaForSequenceClassification"
    assert auto.dtype == torch.float32


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_loads_what_transformers_saves(tmp_path: Path, stored: torch.dtype) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.XLMRobertaConfig(**SIZES, num_labels=3)
    theirs = transformers.XLMRobertaForSequenceClassification(config).to(stored)
    theirs.save_pretrained(tmp_path)
    ours, info = Classifier.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert ours.dtype == torch.float32
    state = theirs.state_dict()
    assert ours.state_dict().keys() == state.keys()
    assert all(torch.equal(v, state[k].float()) for k, v in ours.state_dict().items())


def test_a_masked_language_model_of_transformers_gives_the_base(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.XLMRobertaForMaskedLM(transformers.XLMRobertaConfig(**SIZES))
    theirs.save_pretrained(tmp_path)
    ours, info = Classifier.from_pretrained(tmp_path, num_labels=5, output_loading_info=True)
    assert info["missing_keys"] == HEAD
    assert info["unexpected_keys"] == []  # lm_head.* says nothing about this model
    weight = theirs.roberta.encoder.layer[1].output.dense.weight
    assert torch.equal(ours.state_dict()["roberta.encoder.layer.1.output.dense.weight"], weight)


def test_saved_files_have_usual_rights(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        classifier().save_pretrained(tmp_path)
    finally:
        os.umask(before)
    assert {oct(path.stat().st_mode & 0o777) for path in tmp_path.iterdir()} == {"0o640"}


def test_saving_into_the_directory_it_is_mapped_from(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    model = Classifier.from_pretrained(tmp_path)
    weight = model.roberta.embeddings.word_embeddings.weight
    assert mapped_from(weight, tmp_path / "model.safetensors")
    with torch.no_grad():
        weight += 1.0
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    assert same(Classifier.from_pretrained(tmp_path), model)


def test_training_leaves_the_mapped_file_alone(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    path = tmp_path / "model.safetensors"
    before = digest(path)
    model = Classifier.from_pretrained(tmp_path)
    assert all(mapped_from(p, path) for p in model.parameters())
    old = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    sum((p - 1.0).square().sum() for p in model.parameters()).backward()  # type: ignore[union-attr]
    optimizer.step()
    optimizer.zero_grad()
    # LayerNorm's weights are 1 and stand at the minimum.
    unchanged = [n for n, p in model.named_parameters() if torch.allclose(old[n], p, rtol=0)]
    assert all(p.isfinite().all() for p in model.parameters())
    assert all(name.endswith("LayerNorm.weight") for name in unchanged)
    assert digest(path) == before
    assert not same(Classifier.from_pretrained(tmp_path), model)


def test_nothing_of_transformers_nor_the_hub_is_imported(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    code = (
        "import sys; from xlmr_ext.pretrained import PreTrainedModel\n"
        "from xlmr_ext.configuration import XLMRobertaConfig\n"
        f"XLMRobertaConfig.from_pretrained({str(tmp_path)!r})\n"
        "print([m for m in ('transformers', 'huggingface_hub') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- names and labels -------------------------------------------------------------------------


def test_task_checkpoint_into_the_base_model_and_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint(tmp_path / "task")
    base, info = Base.from_pretrained(
        tmp_path / "task", add_pooling_layer=False, output_loading_info=True
    )
    assert info["missing_keys"] == []
    assert sorted(info["unexpected_keys"]) == sorted(HEAD)
    assert "left out" in caplog.text
    base.save_pretrained(tmp_path / "base")
    stored = load_file(tmp_path / "base" / "model.safetensors")
    assert not [name for name in stored if name.startswith("roberta.")]
    caplog.clear()
    task, info = Classifier.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert info["missing_keys"] == HEAD
    assert info["unexpected_keys"] == []
    assert "train the model before you use it: classifier.dense.weight, " in caplog.text
    assert same(task.roberta, base)
    assert not task.training


def test_missing_weights_are_initialised_as_published(tmp_path: Path) -> None:
    checkpoint(tmp_path, lambda tensors: {k: v for k, v in tensors.items() if k not in HEAD})
    torch.manual_seed(1)
    first = Classifier.from_pretrained(tmp_path, initializer_range=0.5)
    second = Classifier.from_pretrained(tmp_path, initializer_range=0.5)
    torch.manual_seed(1)
    again = Classifier.from_pretrained(tmp_path, initializer_range=0.5)
    weight = first.state_dict()["classifier.dense.weight"]
    assert 0.4 < weight.std().item() < 0.6
    assert not first.state_dict()["classifier.dense.bias"].any()
    assert same(first, again)
    assert not same(first, second)


def test_only_the_missing_half_of_a_module_is_initialised(tmp_path: Path) -> None:
    name = "roberta.encoder.layer.0.output.dense"
    checkpoint(tmp_path, lambda tensors: {k: v for k, v in tensors.items() if k != f"{name}.bias"})
    model, info = Classifier.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == [f"{name}.bias"]
    assert same(model, classifier())  # a bias starts at 0


def test_a_weight_that_nothing_initialises_is_an_error(tmp_path: Path) -> None:
    class Scaled(Classifier):
        def __init__(self, config: XLMRobertaConfig) -> None:
            super().__init__(config)
            self.scale = nn.Parameter(torch.ones(3))

    with pytest.raises(NotImplementedError, match="does not initialise scale"):
        Scaled.from_pretrained(checkpoint(tmp_path))


def test_known_leftovers_are_ignored(tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["roberta.embeddings.position_ids"] = torch.arange(20)[None]
        tensors["roberta.pooler.dense.weight"] = torch.zeros(16, 16)
        tensors["lm_head.bias"] = torch.zeros(50)
        tensors["lm_head.decoder.weight"] = torch.zeros(50, 16)
        tensors["roberta.encoder.layer.2.output.dense.bias"] = torch.zeros(16)

    _, info = Classifier.from_pretrained(checkpoint(tmp_path, change), output_loading_info=True)
    assert info["missing_keys"] == []
    assert info["unexpected_keys"] == ["roberta.encoder.layer.2.output.dense.bias"]


def test_pooler_is_loaded_where_the_model_has_one(tmp_path: Path) -> None:
    torch.manual_seed(3)
    base = Base(XLMRobertaConfig(**SIZES))
    base.save_pretrained(tmp_path)
    loaded, info = Base.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert same(loaded, base)


def test_old_names_of_layer_norm(tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors["roberta.embeddings.LayerNorm.weight"] += 0.5
        return {
            k.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "LayerNorm.bias", "LayerNorm.beta"
            ): v
            for k, v in tensors.items()
        }

    model, info = Classifier.from_pretrained(checkpoint(tmp_path, change), output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(model.roberta.embeddings.LayerNorm.weight, torch.full((16,), 1.5))


def test_two_entries_for_one_parameter(tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["encoder.layer.0.output.dense.bias"] = torch.ones(16)

    with pytest.raises(
        ValueError, match=r"are both roberta\.encoder\.layer\.0\.output\.dense\.bia"
    ):
        Classifier.from_pretrained(checkpoint(tmp_path, change))


def test_labels_given_while_loading(tmp_path: Path) -> None:
    Base(XLMRobertaConfig(**SIZES)).save_pretrained(tmp_path)
    model = Classifier.from_pretrained(tmp_path, num_labels=7)
    assert model.config.num_labels == model.classifier["out_proj"].out_features == 7
    names = {0: "x", 1: "y", 2: "z"}
    model = Classifier.from_pretrained(
        tmp_path, id2label=names, label2id={"x": 0, "y": 1, "z": 2}, num_labels=3
    )
    assert model.config.id2label == names
    config = XLMRobertaConfig(**SIZES, num_labels=4)
    model = Classifier.from_pretrained(tmp_path, config=config, hidden_dropout_prob=0.0)
    assert (model.config.num_labels, model.config.hidden_dropout_prob) == (4, 0.0)
    assert config.hidden_dropout_prob == 0.1


def test_shared_parameters_are_stored_once_and_stay_shared(tmp_path: Path) -> None:
    class Tied(Classifier):
        def __init__(self, config: XLMRobertaConfig) -> None:
            super().__init__(config)
            self.decoder = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            self.decoder.weight = self.roberta.embeddings.word_embeddings.weight

    model = Tied(XLMRobertaConfig(**SIZES))
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    words = "roberta.embeddings.word_embeddings.weight"
    assert words in stored
    assert "decoder.weight" not in stored
    loaded, info = Tied.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert loaded.decoder.weight is loaded.roberta.embeddings.word_embeddings.weight
    assert torch.equal(loaded.decoder.weight, stored[words])
    assert loaded.num_parameters() == classifier(num_labels=2).num_parameters()


def test_views_of_one_buffer_and_strided_parameters_are_saved(tmp_path: Path) -> None:
    model = classifier()
    layers = model.roberta.encoder["layer"]
    block = layers[0]["attention"]["self"]  # type: ignore[index]
    buffer = torch.randn(2, 16, 16)
    for index, name in enumerate(("query", "key", "value")):
        view = buffer[index // 2]  # two parameters, not one, over the same memory
        block[name].weight = nn.Parameter(view.t() if name == "value" else view)
    model.save_pretrained(tmp_path)
    assert same(Classifier.from_pretrained(tmp_path), model)


# --- shapes and types -------------------------------------------------------------------------


def test_other_shapes_are_an_error_naming_both(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    message = (
        r"model\.safetensors: 2 entries .*classifier\.out_proj\.weight: \[3, 16\] in the file, "
        r"\[5, 16\] in the model"
    )
    with pytest.raises(ValueError, match=message):
        Classifier.from_pretrained(tmp_path, num_labels=5)
    model, info = Classifier.from_pretrained(
        tmp_path, num_labels=5, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert info["mismatched_keys"] == [
        ("classifier.out_proj.weight", (3, 16), (5, 16)),
        ("classifier.out_proj.bias", (3,), (5,)),
    ]
    assert info["missing_keys"] == []
    out = model.classifier["out_proj"]
    assert out.weight.shape == (5, 16)
    assert out.weight.std() > 0
    assert not out.bias.any()


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_types(tmp_path: Path, stored: torch.dtype) -> None:
    checkpoint(tmp_path, lambda tensors: {k: v.to(stored) for k, v in tensors.items()})

    def load(**kwargs: Any) -> Classifier:
        model = Classifier.from_pretrained(tmp_path, **kwargs)
        assert {p.dtype for p in model.parameters()} == {model.dtype}
        return model

    path = tmp_path / "model.safetensors"
    expected = {k: v.float() for k, v in load_file(path).items()}
    model = load()
    assert model.dtype == torch.float32
    assert all(torch.equal(v, expected[k]) for k, v in model.state_dict().items())
    automatic = load(dtype="auto")
    assert automatic.dtype == stored
    assert all(mapped_from(p, path) for p in automatic.parameters())
    assert load(torch_dtype=torch.float64).dtype == torch.float64
    assert load(dtype="bfloat16").dtype == load(dtype="torch.bfloat16").dtype == torch.bfloat16
    automatic.save_pretrained(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["dtype"] == str(stored).removeprefix("torch.")
    assert {t.dtype for t in load_file(tmp_path / "again" / "model.safetensors").values()} == {
        stored
    }


def test_mixed_types_and_new_weights_take_one_type(tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            k: v.half() if "attention" in k else v.bfloat16()
            for k, v in tensors.items()
            if k not in HEAD
        }

    checkpoint(tmp_path, change)
    model = Classifier.from_pretrained(tmp_path, dtype="auto")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    model = Classifier.from_pretrained(tmp_path, dtype="float16")
    assert {p.dtype for p in model.parameters()} == {torch.float16}


@pytest.mark.parametrize("wanted", ["int8", torch.int64, "nn", "float3", 7])
def test_unusable_types(tmp_path: Path, wanted: Any) -> None:
    with pytest.raises(ValueError, match="dtype must be"):
        Classifier.from_pretrained(checkpoint(tmp_path), dtype=wanted)


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    name = "roberta.encoder.layer.0.output.dense.weight"
    checkpoint(tmp_path, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    with pytest.raises(ValueError, match=f"{name} has type I8"):
        Classifier.from_pretrained(tmp_path)


def test_unknown_arguments(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    with pytest.raises(TypeError, match="'device_mep', 'num_label'"):
        Classifier.from_pretrained(tmp_path, device_mep="auto", num_label=3)
    with pytest.raises(TypeError, match="dtype and torch_dtype"):
        Classifier.from_pretrained(tmp_path, dtype="auto", torch_dtype="auto")
    with pytest.raises(TypeError, match="config must be"):
        Classifier.from_pretrained(tmp_path, config=3)
    with pytest.raises(TypeError, match="from_dict takes its to_dict"):
        Classifier(SIZES)  # type: ignore[arg-type]
    Classifier.from_pretrained(tmp_path, low_cpu_mem_usage=True, use_safetensors=True)


# --- initialisation and small things ----------------------------------------------------------


def test_initialisation() -> None:
    torch.manual_seed(0)
    model = Classifier(XLMRobertaConfig(**{**SIZES, "vocab_size": 5000}))
    state = model.state_dict()
    words = state["roberta.embeddings.word_embeddings.weight"]
    assert abs(words.std().item() - 0.02) < 0.001
    assert abs(words.mean().item()) < 0.001
    assert not words[1].any()
    assert not state["roberta.embeddings.position_embeddings.weight"][1].any()
    assert words[0].any()
    for name, tensor in state.items():
        if name.endswith("LayerNorm.weight"):
            assert torch.equal(tensor, torch.ones_like(tensor)), name
        elif name.endswith("bias"):
            assert not tensor.any(), name
        else:
            assert 0.01 < tensor.std().item() < 0.03, name


def test_a_model_inside_is_initialised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[nn.Module] = []
    original = PreTrainedModel._init_weights

    def count(self: PreTrainedModel, module: nn.Module) -> None:
        done.append(module)
        original(self, module)

    monkeypatch.setattr(PreTrainedModel, "_init_weights", count)
    model = classifier()
    assert len(done) == len(set(done))
    with_parameters = {m for m in model.modules() if m._parameters}
    assert with_parameters <= set(done)


def test_number_of_parameters() -> None:
    model = classifier()
    total = sum(p.numel() for p in model.parameters())
    embeddings = (50 + 20 + 1) * 16
    assert model.num_parameters() == total
    assert model.num_parameters(exclude_embeddings=True) == total - embeddings
    words = model.get_input_embeddings()
    assert words is model.roberta.embeddings.word_embeddings is model.roberta.get_input_embeddings()
    words.requires_grad_(False)
    assert model.num_parameters(only_trainable=True) == total - 50 * 16
    replacement = nn.Embedding(60, 16)
    model.set_input_embeddings(replacement)
    assert model.get_input_embeddings() is replacement


def test_buffers_of_a_file_nobody_can_fill(tmp_path: Path) -> None:
    class Odd(Classifier):
        def __init__(self, config: XLMRobertaConfig) -> None:
            super().__init__(config)
            self.register_buffer("table", torch.ones(3), persistent=False)

    with pytest.raises(NotImplementedError, match=r"\['table'\] and no reset_buffers"):
        Odd.from_pretrained(checkpoint(tmp_path))


def test_loading_is_indifferent_to_the_default_device(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    with torch.device("meta"):
        model = Classifier.from_pretrained(tmp_path)
    assert same(model, classifier())
