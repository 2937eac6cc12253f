"""Arguments of from_pretrained and save_pretrained as transformers has them; BERT's layout."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import HEAD, SIZES, Base, Classifier, checkpoint, classifier, mapped_from, same

from xlmr_ext import XLMRobertaForSequenceClassification, XLMRobertaModel
from xlmr_ext.configuration import XLMRobertaConfig

# --- taken, without effect, refused -----------------------------------------------------------


def test_arguments_without_effect(tmp_path: Path) -> None:
    model = Classifier.from_pretrained(
        pretrained_model_name_or_path=checkpoint(tmp_path),
        attn_implementation="flash_attention_2",
        low_cpu_mem_usage=True,
        trust_remote_code=True,
        weights_only=True,
        resume_download=None,
        proxies=None,
        quantization_config=None,
        load_in_8bit=False,
        from_tf=False,
        force_download=True,
        offload_folder=None,
        max_memory=None,
        variant=None,
        subfolder="",
        revision="main",
        token=True,
    )
    assert same(model, classifier())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"proxies": {"https": "x"}}, "proxies is not supported: set the environment variables"),
        ({"use_auth_token": "x"}, "use_auth_token is not supported: its name is token"),
        ({"load_in_8bit": True}, "load_in_8bit is not supported: call"),
        ({"quantization_config": {}}, "quantization_config is not supported: other"),
        ({"from_tf": True}, "from_tf is not supported: TensorFlow"),
        ({"gguf_file": "x.gguf"}, "gguf_file is not supported"),
        ({"max_memory": {0: "1GB"}}, "max_memory is not supported: the model is placed on one dev"),
        ({"weights_only": False}, "weights_only must be true"),
        ({"device_map": {"roberta": 0, "classifier": "cpu"}}, "device_map .*got parts"),
        ({"device_map": "nowhere"}, "device_map must be a device, got 'nowhere'"),
        ({"device_map": 1.5}, "device_map must be a device, got 1.5"),
        ({"device_map": "meta"}, "a device that holds data"),
        ({"subfolder": "../x"}, "subfolder must name a folder within the model"),
        ({"subfolder": "/etc"}, "subfolder must name a folder within the model"),
        ({"use_safetensors": "no"}, "use_safetensors must be True, False or None"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refused_arguments(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Classifier.from_pretrained(checkpoint(tmp_path), **arguments)


@pytest.mark.parametrize(
    "device_map", [None, "auto", "cpu", torch.device("cpu"), {"": "cpu"}, "balanced"], ids=str
)
def test_devices(tmp_path: Path, device_map: Any) -> None:
    model = Classifier.from_pretrained(checkpoint(tmp_path), device_map=device_map)
    assert model.device == torch.device("cpu")
    assert all(mapped_from(p, tmp_path / "model.safetensors") for p in model.parameters())


def test_subfolder(tmp_path: Path) -> None:
    checkpoint(tmp_path / "models" / "best")
    assert same(Classifier.from_pretrained(tmp_path, subfolder="models/best"), classifier())
    assert XLMRobertaConfig.from_pretrained(tmp_path, subfolder="models/best").num_labels == 3
    with pytest.raises(FileNotFoundError, match="has no folder other; found: models"):
        Classifier.from_pretrained(tmp_path, subfolder="other")


def test_weights_of_a_state_dict(tmp_path: Path) -> None:
    source = classifier()
    state = source.state_dict()
    for name in (None, checkpoint(tmp_path)):
        config = source.config if name is None else None
        model, info = Classifier.from_pretrained(
            name, config=config, state_dict=state, output_loading_info=True
        )
        assert not any(info.values())
        assert same(model, source)
        with torch.no_grad():
            model.get_parameter(HEAD[0]).zero_()
        assert source.get_parameter(HEAD[0]).any()
    (tmp_path / "model.safetensors").unlink()
    assert same(Classifier.from_pretrained(tmp_path, state_dict=state), source)
    del state[HEAD[0]]
    _, info = Classifier.from_pretrained(tmp_path, state_dict=state, output_loading_info=True)
    assert info["missing_keys"] == [HEAD[0]]
    with pytest.raises(TypeError, match="is None, which needs config and state_dict"):
        Classifier.from_pretrained(None, state_dict=state)
    with pytest.raises(ValueError, match="state_dict: a is int; expected nothing but tensors"):
        Classifier.from_pretrained(tmp_path, state_dict={"a": 3})
    with pytest.raises(ValueError, match="state_dict: expected names and tensors, found list"):
        Classifier.from_pretrained(tmp_path, state_dict=[])


def test_saving_as_accelerate_does(tmp_path: Path) -> None:
    model = classifier()
    state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "no", is_main_process=False, save_function=torch.save)
    assert not (tmp_path / "no").exists()
    model.save_pretrained(
        tmp_path, is_main_process=True, save_function=torch.save, state_dict=state
    )
    stored = load_file(tmp_path / "model.safetensors")
    assert stored.keys() == state.keys()
    assert all(torch.equal(stored[name], state[name]) for name in state)
    with pytest.raises(ValueError, match=r"huggingface_hub\.upload_folder"):
        model.save_pretrained(tmp_path, push_to_hub=True)


# --- what a configuration may ask for ---------------------------------------------------------


def change_config(directory: Path, **values: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    "values",
    [
        {"vocab_size": 2**31 - 1},  # 34 * 10^9 parameters
        {"id2label": None, "label2id": None, "num_labels": 300_000},
        {"intermediate_size": 2**20, "num_hidden_layers": 256},
        {"hidden_size": 2**14, "num_attention_heads": 2**10},
        {"max_position_embeddings": 2**20},
    ],
    ids=lambda values: next(iter(values)),
)
@pytest.mark.parametrize("ignore", [False, True])
def test_absurd_sizes_ask_for_no_memory(
    tmp_path: Path, values: dict[str, Any], ignore: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint(tmp_path)
    change_config(tmp_path, **values)

    def allocate(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("memory for parameters")

    monkeypatch.setattr(torch, "full", allocate)
    with pytest.raises(ValueError, match=r"model\.safetensors: "):
        Classifier.from_pretrained(tmp_path, ignore_mismatched_sizes=ignore)


def test_more_parameters_than_anybody_has(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    change_config(tmp_path, vocab_size=2**31 - 1, hidden_size=2**16, num_attention_heads=2**10)
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"config\.json: .* a model of 1\.4e\+14 parameters"):
        Classifier.from_pretrained(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 10**7
    tracemalloc.stop()


# --- BERT's layout ----------------------------------------------------------------------------

BERT = {**SIZES, "type_vocab_size": 2, "layer_norm_eps": 1e-12, "vocab_size": 60}


def as_bert(directory: Path, kind: str, **settings: Any) -> Any:
    """A folder in BERT's layout whose tokenizer is XLM-R's, and the model of transformers."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(**BERT, tokenizer_class="XLMRobertaTokenizer", **settings)
    theirs = getattr(transformers, kind)(config).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    theirs.save_pretrained(directory)
    return theirs


@pytest.mark.parametrize("kind", ["one file", "shards", "torch"])
def test_a_folder_in_bert_layout(tmp_path: Path, kind: str) -> None:
    theirs = as_bert(tmp_path, "BertModel")
    if kind == "shards":
        theirs.save_pretrained(tmp_path, max_shard_size="8KB")
        (tmp_path / "model.safetensors").unlink(missing_ok=True)
    if kind == "torch":
        torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    ours, info = XLMRobertaModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert ours.config.max_position_embeddings == 22
    ids = torch.randint(5, 60, (2, 18))
    with torch.no_grad():
        expected = theirs(ids)
        found = ours(ids)
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state)
    torch.testing.assert_close(found.pooler_output, expected.pooler_output)
    ours.save_pretrained(tmp_path / "again")
    again = XLMRobertaModel.from_pretrained(tmp_path / "again")
    assert same(again, ours)


def test_a_classifier_in_bert_layout(tmp_path: Path) -> None:
    theirs = as_bert(tmp_path, "BertForSequenceClassification", num_labels=3)
    for config in (None, XLMRobertaConfig.from_pretrained(tmp_path)):
        ours, info = XLMRobertaForSequenceClassification.from_pretrained(
            tmp_path, config=config, output_loading_info=True
        )
        assert not any(info.values())
        ids = torch.randint(5, 60, (4, 9))
        with torch.no_grad():
            torch.testing.assert_close(ours(ids).logits, theirs(ids).logits)


def test_words_stay_mapped_in_bert_layout(tmp_path: Path) -> None:
    as_bert(tmp_path, "BertModel")
    model = XLMRobertaModel.from_pretrained(tmp_path)
    words = model.get_parameter("embeddings.word_embeddings.weight")
    assert mapped_from(words, tmp_path / "model.safetensors")


def test_another_bert_is_refused(tmp_path: Path) -> None:
    as_bert(tmp_path, "BertModel")
    change_config(tmp_path, tokenizer_class="BertTokenizer")
    with pytest.raises(ValueError, match=r"config\.json: model_type 'bert' with vocab_size 60"):
        XLMRobertaModel.from_pretrained(tmp_path)


def test_two_entries_for_one_in_bert_layout(tmp_path: Path) -> None:
    as_bert(tmp_path, "BertModel")
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["bert.embeddings.LayerNorm.gamma"] = torch.ones(16)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.safetensors: .* are both roberta\.embeddings"):
        Base.from_pretrained(tmp_path)
