"""XLMRobertaConfig: Hugging Face's file format both ways, labels, refusal of the unusable."""

from __future__ import annotations

import copy
import json
import math
import pickle
import time
from pathlib import Path
from typing import Any

import pytest

from xlmr_ext.configuration import XLMRobertaConfig


def write_config(directory: Path, values: Any) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(values))
    return directory


def test_defaults_are_the_base_model() -> None:
    transformers = pytest.importorskip("transformers")
    ours = XLMRobertaConfig()
    assert (ours.vocab_size, ours.max_position_embeddings, ours.type_vocab_size) == (250002, 514, 1)
    assert ours.layer_norm_eps == 1e-5
    assert (ours.head_size, ours.num_labels, ours.use_return_dict) == (64, 2, True)
    # vocab_size, positions, types and eps are BERT's in their bare class, so they are given.
    theirs = transformers.XLMRobertaConfig(
        vocab_size=250002, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5
    ).to_dict()
    values = ours.to_dict()
    shared = values.keys() & theirs.keys() - {"transformers_version", "architectures"}
    assert len(shared) >= 20
    assert {k: values[k] for k in shared} == {k: theirs[k] for k in shared}


def test_transformers_reads_what_is_saved(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = XLMRobertaConfig(
        hidden_size=32,
        num_attention_heads=4,
        id2label={0: "war", 1: "peace", 2: "neither"},
        hidden_act="gelu_new",
        architectures=["XLMRobertaForSequenceClassification"],
        classifier_dropout=0.25,
    )
    config.save_pretrained(tmp_path / "new" / "directory")
    theirs = transformers.AutoConfig.from_pretrained(tmp_path / "new" / "directory")
    assert type(theirs).__name__ == "XLMRobertaConfig"
    assert theirs.id2label == {0: "war", 1: "peace", 2: "neither"}
    assert theirs.label2id == {"war": 0, "peace": 1, "neither": 2}
    assert (theirs.num_labels, theirs.hidden_act, theirs.classifier_dropout) == (
        3,
        "gelu_new",
        0.25,
    )
    assert theirs.architectures == ["XLMRobertaForSequenceClassification"]


def test_reads_what_transformers_saves(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.XLMRobertaConfig(
        vocab_size=99, hidden_size=32, num_attention_heads=4, id2label={0: "a", 1: "b", 2: "c"}
    )
    theirs.save_pretrained(tmp_path)
    ours = XLMRobertaConfig.from_pretrained(tmp_path)
    assert (ours.vocab_size, ours.hidden_size, ours.num_labels) == (99, 32, 3)
    assert ours.id2label == {0: "a", 1: "b", 2: "c"}
    assert ours.layer_norm_eps == theirs.layer_norm_eps


def test_json_has_string_keys_and_round_trips(tmp_path: Path) -> None:
    config = XLMRobertaConfig(num_labels=12, dtype="torch.float16")
    values = json.loads(config.to_json_string())
    assert list(values["id2label"])[:3] == ["0", "1", "10"]
    assert values["model_type"] == "xlm-roberta"
    assert values["dtype"] == "float16"
    config.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert XLMRobertaConfig.from_pretrained(tmp_path) == config
    assert XLMRobertaConfig.from_dict(config.to_dict()) == config


def test_unknown_keys_are_kept_and_written_back(tmp_path: Path) -> None:
    values = {"model_type": "xlm-roberta", "my_key": [1, {"x": None}], "to_dict": 1, "_odd": 2}
    config = XLMRobertaConfig.from_pretrained(write_config(tmp_path, values))
    assert config.my_key == [1, {"x": None}]
    config.another = "later"
    written = config.to_dict()
    assert {key: written[key] for key in ("my_key", "to_dict", "_odd", "another")} == {
        "my_key": [1, {"x": None}],
        "to_dict": 1,
        "_odd": 2,
        "another": "later",
    }
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        _ = config.absent


def test_copies(tmp_path: Path) -> None:
    config = XLMRobertaConfig(num_labels=4, extra={"a": 1})
    for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert other == config
        other.extra["a"] = 2
        other.num_labels = 5
    assert (config.extra, config.num_labels) == ({"a": 1}, 4)


def test_old_name_of_dtype() -> None:
    assert XLMRobertaConfig.from_dict({"torch_dtype": "float16"}).dtype == "float16"


def test_labels() -> None:
    assert XLMRobertaConfig(num_labels=3).label2id == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}
    assert XLMRobertaConfig(id2label={"1": "b", "0": "a"}).label2id == {"a": 0, "b": 1}
    assert XLMRobertaConfig(label2id={"b": 1, "a": "0"}).id2label == {0: "a", 1: "b"}
    config = XLMRobertaConfig(id2label={0: "a", 1: "b"})
    config.num_labels = 2
    assert config.id2label == {0: "a", 1: "b"}
    config.num_labels = 3
    assert config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    assert config.label2id == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_labels": 0}, "num_labels must be 1 to"),
        ({"num_labels": 10**12}, "num_labels must be 1 to"),
        ({"num_labels": 3, "id2label": {0: "a", 1: "b"}}, "num_labels = 3 contradicts the 2"),
        ({"id2label": {1: "a", 2: "b"}}, "without a gap"),
        ({"id2label": {}}, "without a gap"),
        ({"id2label": {0: "a", 1: "a"}}, "'a' .str. twice"),
        ({"id2label": {"x": "a"}}, "a label's number"),
        ({"label2id": {"a": 0, "b": 0}}, "two labels the number 0"),
        ({"id2label": {0: "a"}, "label2id": {"b": 0}}, "contradict each other"),
    ],
)
def test_unusable_labels(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        XLMRobertaConfig(**kwargs)


def test_labels_overridden(tmp_path: Path) -> None:
    file = {"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}}
    write_config(tmp_path, file)

    def read(**overrides: Any) -> dict[int, str]:
        return XLMRobertaConfig.from_pretrained(tmp_path, **overrides).id2label

    assert read() == read(num_labels=2) == read(num_labels=None) == {0: "a", 1: "b"}
    assert read(num_labels=3) == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    assert read(id2label={0: "x", 1: "y", 2: "z"}) == {0: "x", 1: "y", 2: "z"}
    assert read(label2id={"x": 0}) == {0: "x"}
    with pytest.raises(ValueError, match=r"config\.json: num_labels = 3 contradicts"):
        read(num_labels=3, id2label={0: "x"})


def test_stale_label2id_of_a_file_gives_way(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_config(tmp_path, {"id2label": {"0": "a", "1": "b"}, "label2id": {"LABEL_0": 0}})
    config = XLMRobertaConfig.from_pretrained(tmp_path)
    assert config.label2id == {"a": 0, "b": 1}
    assert "label2id" in caplog.text


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_hidden_layers": 10**12}, "num_hidden_layers must be between 1 and 256"),
        ({"num_hidden_layers": 10**5000}, "num_hidden_layers must be .* an integer of"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"vocab_size": 2**31}, "vocab_size"),
        ({"hidden_size": 60000, "num_attention_heads": 600, "vocab_size": 2**31 - 1}, "parameters"),
        ({"hidden_size": 100, "num_attention_heads": 3}, "multiple of num_attention_heads"),
        ({"hidden_size": 768, "num_attention_heads": 4}, "at most 128, got 768 / 4 = 192"),
        ({"pad_token_id": 7, "vocab_size": 7}, "pad_token_id must be below vocab_size"),
        ({"max_position_embeddings": 2}, "max_position_embeddings must be above"),
        ({"max_position_embeddings": 10**9}, "max_position_embeddings must be between"),
        ({"hidden_act": "silu"}, "'gelu', 'gelu_new', 'gelu_pytorch_tanh', 'relu'; got 'silu'"),
        ({"position_embedding_type": "relative_key"}, "'absolute', 'sinusoidal'; got"),
        ({"problem_type": "guess"}, "problem_type"),
        ({"hidden_dropout_prob": 1.0}, "hidden_dropout_prob must be at least 0 and below 1"),
        ({"attention_probs_dropout_prob": -0.1}, "attention_probs_dropout_prob"),
        ({"classifier_dropout": math.nan}, "classifier_dropout"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps"),
        ({"layer_norm_eps": math.nan}, "layer_norm_eps"),
        ({"initializer_range": math.inf}, "initializer_range"),
        ({"eos_token_id": -2}, "eos_token_id"),
        ({"is_decoder": True}, "is_decoder must be false"),
        ({"add_cross_attention": True}, "add_cross_attention must be false"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is not supported"),
    ],
)
def test_unusable_values(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        XLMRobertaConfig(**kwargs)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"hidden_size": 768.0},
        {"hidden_size": "768"},
        {"num_attention_heads": True},
        {"vocab_size": None},
        {"layer_norm_eps": "1e-5"},
        {"hidden_dropout_prob": None},
        {"num_labels": 2.0},
        {"id2label": ["a", "b"]},
        {"output_hidden_states": 1},
        {"architectures": "XLMRobertaModel"},
    ],
)
def test_values_of_a_wrong_kind(kwargs: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=next(iter(kwargs))):
        XLMRobertaConfig(**kwargs)


def test_changed_values_are_checked_before_saving(tmp_path: Path) -> None:
    config = XLMRobertaConfig()
    config.hidden_size = 770
    with pytest.raises(ValueError, match="hidden_size"):
        config.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("xlm-roberta-xl", "XLM-R XL and XXL .* pre-LayerNorm"),
        ("bert", "is not of XLM-R's vocabulary"),
        ("camembert", "got 'camembert' .*a French vocabulary"),
        ("roberta", "got 'roberta' .*an English vocabulary"),
        ("xlm", "got 'xlm' .*the older XLM"),
        ("gpt2", r"must be 'xlm-roberta', got 'gpt2' \(str\)$"),
        (["xlm-roberta"], "got .'xlm-roberta'. .list."),
    ],
)
def test_other_models_are_refused(tmp_path: Path, model_type: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        XLMRobertaConfig.from_pretrained(write_config(tmp_path, {"model_type": model_type}))
    assert str(tmp_path / "config.json") in str(caught.value)


def test_an_old_file_without_model_type(tmp_path: Path) -> None:
    write_config(tmp_path, {"architectures": ["XLMRobertaForMaskedLM"], "vocab_size": 250002})
    assert XLMRobertaConfig.from_pretrained(tmp_path).vocab_size == 250002
    write_config(tmp_path, {"architectures": ["RobertaForMaskedLM"], "vocab_size": 50265})
    with pytest.raises(ValueError, match=r"config\.json: architectures must name a class of XLM-R"):
        XLMRobertaConfig.from_pretrained(tmp_path)


def test_bert_layout_is_read_as_xlm_r(tmp_path: Path) -> None:
    file = {
        "model_type": "bert",
        "vocab_size": 250037,
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "tokenizer_class": "XLMRobertaTokenizer",
        "architectures": ["BertModel"],
        "id2label": {"0": "a", "1": "b", "2": "c"},
    }
    config = XLMRobertaConfig.from_pretrained(write_config(tmp_path, file), num_labels=4)
    assert (config.vocab_size, config.max_position_embeddings, config.type_vocab_size) == (
        250002,
        514,
        1,
    )
    assert (config.num_labels, config.model_type) == (4, "xlm-roberta")
    assert config.architectures == ["XLMRobertaModel"]


def test_a_million_labels_take_seconds() -> None:
    names = {str(i): f"name {i}" for i in range(10**6)}
    labels = {"id2label": names, "label2id": {name: int(i) for i, name in names.items()}}
    began = time.process_time()
    config = XLMRobertaConfig.from_dict(labels)
    config.validate()
    assert config.num_labels == 10**6
    assert time.process_time() - began < 40
    with pytest.raises(ValueError, match="num_labels must be 1 to 1000000"):
        XLMRobertaConfig.from_dict({"num_labels": 10**6 + 1})
    names[str(10**6)] = "one more"
    with pytest.raises(ValueError, match="at most 1000000 labels are accepted, got 1000001"):
        XLMRobertaConfig.from_dict({"id2label": names})


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"[1]", b"null", b'{"hidden_size": 1' + b"0" * 5000],
    ids=["empty", "cut", "encoding", "deep", "list", "null", "long"],
)
def test_files_that_are_no_configuration(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises((TypeError, ValueError), match=r"config\.json: "):
        XLMRobertaConfig.from_pretrained(tmp_path)


def test_a_file_too_large_to_be_one(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(2**40)  # sparse
    with pytest.raises(ValueError, match="too large"):
        XLMRobertaConfig.from_pretrained(tmp_path)


def test_missing_files(tmp_path: Path) -> None:
    (tmp_path / "vocabulary.txt").touch()
    with pytest.raises(FileNotFoundError, match=r"no file config\.json; found: vocabulary\.txt"):
        XLMRobertaConfig.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="no directory"):
        XLMRobertaConfig.from_pretrained(tmp_path / "absent")
    with pytest.raises(NotADirectoryError, match="is a file"):
        XLMRobertaConfig.from_pretrained(tmp_path / "vocabulary.txt")
    with pytest.raises(ValueError, match="neither a directory nor a hub name"):
        XLMRobertaConfig.from_pretrained("no such name", local_files_only=True)
    with pytest.raises(TypeError, match="name_or_path"):
        XLMRobertaConfig.from_pretrained(3)  # type: ignore[arg-type]


def test_arguments_of_transformers_are_no_settings(tmp_path: Path) -> None:
    XLMRobertaConfig().save_pretrained(tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    config = XLMRobertaConfig.from_pretrained(
        tmp_path,
        trust_remote_code=True,
        return_unused_kwargs=False,
        proxies=None,
        resume_download=None,
        use_auth_token=None,
    )
    config.save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_bytes() == before
    for name in ("return_unused_kwargs", "proxies", "use_auth_token"):
        with pytest.raises(ValueError, match=f"{name} is not supported: "):
            XLMRobertaConfig.from_pretrained(tmp_path, **{name: "x"})
    assert XLMRobertaConfig.from_pretrained(tmp_path, my_own=3).my_own == 3
