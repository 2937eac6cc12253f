"""``xlmr-ext convert``: checkpoints of every layout, and what becomes of bad ones."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from fairseq_files import HIDDEN, encode, forward, head_logits, lm_logits, write_folder
from safetensors.torch import load_file, save_file
from xlmr_vocabulary import write_tiny_vocabulary

from xlmr_ext import (
    XLMRobertaConfig,
    XLMRobertaForQuestionAnswering,
    XLMRobertaForSequenceClassification,
    XLMRobertaModel,
    XLMRobertaTokenizer,
)
from xlmr_ext.cli import main
from xlmr_ext.conversion import convert_checkpoint
from xlmr_ext.hub import OutOfReachError

TEXT = "Le petit chat"
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def convert(source: Path | str, output: Path, *options: str) -> int:
    return main(["convert", "--model", str(source), "--output", str(output), *options])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def our_folder(kind: type[Any], folder: Path, **changes: Any) -> Any:
    """A saved random model of ours with a tokenizer that fits it."""
    folder.mkdir()
    tokenizer = XLMRobertaTokenizer(write_tiny_vocabulary(folder))
    tokenizer.save_pretrained(folder)
    config = XLMRobertaConfig(
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": HIDDEN,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "intermediate_size": 40,
            "max_position_embeddings": 22,
            **changes,
        }
    )
    model = kind(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    return model


# --- from fairseq -----------------------------------------------------------------------------


def test_fairseq_language_model_in_transformers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of it, from text to logits, against fairseq's formula."""
    state = write_folder(tmp_path / "in", old=True, shuffled=True)
    assert convert(tmp_path / "in", tmp_path / "out") == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == (
        f"xlmr-ext: wrote {tmp_path / 'out'}: config.json, model.safetensors, "
        "sentencepiece.bpe.model, special_tokens_map.json, tokenizer_config.json\n"
    )
    assert not any(name.startswith(".") for name in contents(tmp_path / "out"))
    mode = (tmp_path / "out" / "model.safetensors").stat().st_mode
    assert stat.S_IMODE(mode) == stat.S_IMODE((tmp_path / "in" / "model.pt").stat().st_mode)

    model = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "out", dtype=torch.float64)
    tokenizer = XLMRobertaTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.model_max_length == 20
    ours = torch.tensor([tokenizer(TEXT)["input_ids"]])
    theirs = torch.tensor([encode(tmp_path / "in", TEXT)])
    with torch.no_grad():
        got = model.eval()(ours).logits
        expected = lm_logits(state, forward(state, theirs))
    torch.testing.assert_close(got[..., ours[0]], expected[..., theirs[0]], **CLOSE)


def test_fairseq_classifier(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = write_folder(tmp_path / "in", heads={"topic": 3, "mood": 2})
    assert convert(tmp_path / "in", tmp_path / "out") == 1
    assert "several heads, choose one with head: mood, topic" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert convert(tmp_path / "in", tmp_path / "out", "--head", "mood") == 0
    notes = capsys.readouterr().err
    assert "note: left out: the heads topic (kept: mood)\n" in notes
    assert "note: left out: the head of the masked language model\n" in notes
    model = XLMRobertaForSequenceClassification.from_pretrained(tmp_path / "out", dtype="auto")
    ids = torch.tensor([encode(tmp_path / "in", TEXT)])
    with torch.no_grad():
        got = model(ids).logits
        expected = head_logits(state, forward(state, ids), "mood")
    torch.testing.assert_close(got, expected, **CLOSE)


def test_a_checkpoint_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_folder(tmp_path / "in", vocabulary=False)
    path = tmp_path / "in" / "checkpoint_best.pt"
    (tmp_path / "in" / "model.pt").rename(path)
    assert convert(path, tmp_path / "out", "--dtype", "bfloat16") == 0
    assert "note: no tokenizer was there to be copied\n" in capsys.readouterr().err
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_settings_that_no_model_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_folder(tmp_path / "in", settings={"dropout": 7.0})
    assert convert(tmp_path / "in", tmp_path / "out") == 1
    assert f"{tmp_path / 'in'}: hidden_dropout_prob must be" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_pickle_that_runs_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Runs:
        def __reduce__(self) -> Any:
            return os.system, (f"touch '{tmp_path}/it ran'",)

    write_folder(tmp_path / "in")
    torch.save({"args": Runs(), "model": {}}, tmp_path / "in" / "model.pt")
    assert convert(tmp_path / "in", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "asks for posix.system, which is not data; nothing of it was run" in error
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


# --- to fairseq -------------------------------------------------------------------------------


@pytest.mark.parametrize("names", ["new", "old"])
def test_to_fairseq_and_back(tmp_path: Path, names: str) -> None:
    write_folder(tmp_path / "a")
    assert convert(tmp_path / "a", tmp_path / "b") == 0
    assert convert(tmp_path / "b", tmp_path / "c", "--to", "fairseq", "--names", names) == 0
    assert set(contents(tmp_path / "c")) == {"dict.txt", "model.pt", "sentencepiece.bpe.model"}
    assert convert(tmp_path / "c", tmp_path / "d") == 0
    assert contents(tmp_path / "b") == contents(tmp_path / "d")


def test_a_classifier_to_fairseq(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = our_folder(XLMRobertaForSequenceClassification, tmp_path / "a", num_labels=3)
    assert convert(tmp_path / "a", tmp_path / "b", "--to", "fairseq", "--head", "topic") == 0
    assert "note: the row of token type 0 is added to the positions" in capsys.readouterr().err
    state = torch.load(tmp_path / "b" / "model.pt", weights_only=False)["model"]
    ids = torch.tensor([encode(tmp_path / "b", TEXT)])
    with torch.no_grad():
        expected = model(ids).logits
    torch.testing.assert_close(head_logits(state, forward(state, ids), "topic"), expected, **CLOSE)


def test_a_head_that_fairseq_does_not_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    our_folder(XLMRobertaForQuestionAnswering, tmp_path / "a")
    assert convert(tmp_path / "a", tmp_path / "b", "--to", "fairseq") == 0
    said = capsys.readouterr().err
    assert "left out, as fairseq has no place for them: qa_outputs.bias, qa_outputs.weight" in said


def test_no_dictionary_without_a_tokenizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    our_folder(XLMRobertaModel, tmp_path / "a")
    for name in ("sentencepiece.bpe.model", "tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / "a" / name).unlink()
    assert convert(tmp_path / "a", tmp_path / "b", "--to", "fairseq") == 1
    assert "has no tokenizer, without which no dict.txt" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


# --- from Hugging Face ------------------------------------------------------------------------


def bert_folder(kind: str, folder: Path) -> Any:
    """A random model in BERT's layout, as multilingual E5 small is stored."""
    folder.mkdir()
    write_tiny_vocabulary(folder)
    config = transformers.BertConfig(
        vocab_size=230,
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        max_position_embeddings=20,
        num_labels=3,
        tokenizer_class="XLMRobertaTokenizer",
    )
    torch.manual_seed(1)
    model = getattr(transformers, kind)(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", ["Model", "ForSequenceClassification", "ForMaskedLM"])
def test_bert_layout(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The result is an XLM-R to transformers, and computes what the BERT does."""
    theirs = bert_folder(f"Bert{kind}", tmp_path / "in")
    assert convert(tmp_path / "in", tmp_path / "out") == 0
    said = capsys.readouterr().err
    assert "note: BERT's layout: " in said
    assert "left out: " not in said.replace("are left out", "")
    auto = getattr(transformers, f"AutoModel{kind if kind != 'Model' else ''}")
    model = auto.from_pretrained(tmp_path / "out", dtype=torch.float64).eval()
    assert type(model).__name__ == f"XLMRoberta{kind}"
    ids = torch.tensor([encode_alone(tmp_path / "out", TEXT)])
    with torch.no_grad():
        for got, expected in zip(model(ids).to_tuple(), theirs(ids).to_tuple(), strict=True):
            torch.testing.assert_close(got, expected, **CLOSE)


def encode_alone(folder: Path, text: str) -> list[int]:
    ids: list[int] = XLMRobertaTokenizer.from_pretrained(folder)(text)["input_ids"]
    return ids


def test_another_bert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bert_folder("BertModel", tmp_path / "in")
    path = tmp_path / "in" / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "tokenizer_class": "BertTokenizer"}))
    assert convert(tmp_path / "in", tmp_path / "out") == 1
    assert f"{path}: model_type 'bert' with vocab_size 230 and" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("pooler", [True, False])
def test_types_shards_and_pooler(tmp_path: Path, pooler: bool) -> None:
    model = our_folder(
        XLMRobertaModel if pooler else XLMRobertaForSequenceClassification, tmp_path / "a"
    )
    if not pooler:
        # An encoder alone, as many are published.
        values = json.loads((tmp_path / "a" / "config.json").read_text())
        values["architectures"] = ["XLMRobertaModel"]
        (tmp_path / "a" / "config.json").write_text(json.dumps(values))
        entries = load_file(tmp_path / "a" / "model.safetensors")
        entries = {k: v for k, v in entries.items() if k.startswith("roberta.")}
        save_file(entries, tmp_path / "a" / "model.safetensors", {"format": "pt"})
    options = ("--dtype", "float16", "--max-shard-size", "10KB")
    assert convert(tmp_path / "a", tmp_path / "b", *options) == 0
    shards = sorted((tmp_path / "b").glob("model-*.safetensors"))
    assert len(shards) > 2
    written = {name: value for shard in shards for name, value in load_file(shard).items()}
    base = model if pooler else model.roberta
    assert written.keys() == base.state_dict().keys()
    for name, value in base.state_dict().items():
        assert torch.equal(written[name], value.half()), name


def test_what_is_left_out_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    our_folder(XLMRobertaForSequenceClassification, tmp_path / "a")
    path = tmp_path / "a" / "model.safetensors"
    entries = {
        **load_file(path),
        "lm_head.bias": torch.zeros(3),
        "roberta.embeddings.position_ids": torch.arange(3),
        "more": torch.zeros(1),
    }
    save_file(entries, path, {"format": "pt"})
    assert convert(tmp_path / "a", tmp_path / "b") == 0
    assert "note: left out: lm_head.bias, more\n" in capsys.readouterr().err


def test_no_weights_are_made_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    our_folder(XLMRobertaForSequenceClassification, tmp_path / "a")
    path = tmp_path / "a" / "model.safetensors"
    entries = load_file(path)
    del entries["classifier.out_proj.bias"]
    save_file(entries, path, {"format": "pt"})
    assert convert(tmp_path / "a", tmp_path / "b") == 1
    error = capsys.readouterr().err
    assert f"{path}: no whole XLMRobertaForSequenceClassification" in error
    assert "lacks classifier.out_proj.bias" in error
    assert not (tmp_path / "b").exists()


def test_a_class_of_somebody_elses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    our_folder(XLMRobertaForSequenceClassification, tmp_path / "a")
    path = tmp_path / "a" / "config.json"
    path.write_text(path.read_text().replace("XLMRobertaForSequenceClassification", "MyModel"))
    assert convert(tmp_path / "a", tmp_path / "b") == 0
    said = capsys.readouterr().err
    assert "the class in config.json is MyModel: the encoder alone is kept" in said
    assert "left out: classifier.dense.bias" in said


def test_the_tokenizer_of_a_hub_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is of the commit that the weights are of, and one that is out of reach is not absent."""
    commit = "0123456789" * 4
    repository = tmp_path / "hub" / "models--owner--name"
    (repository / "snapshots").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    our_folder(XLMRobertaModel, repository / "snapshots" / commit)
    hub = {"cache_dir": tmp_path / "hub", "local_files_only": True}
    seen = []
    real = XLMRobertaTokenizer.from_pretrained

    def look(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs)
        return real(*args, **kwargs)

    monkeypatch.setattr(XLMRobertaTokenizer, "from_pretrained", look)
    assert convert_checkpoint("owner/name", tmp_path / "out", hub=hub) == []
    assert seen == [{**hub, "revision": commit}]

    def lost(*args: Any, **kwargs: Any) -> Any:
        raise OutOfReachError("the connection was lost")

    monkeypatch.setattr(XLMRobertaTokenizer, "from_pretrained", lost)
    with pytest.raises(OSError, match="the connection was lost"):
        convert_checkpoint("owner/name", tmp_path / "again", hub=hub)
    assert not (tmp_path / "again").exists()


# --- arguments --------------------------------------------------------------------------------


def test_an_output_that_is_in_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_folder(tmp_path / "a")
    before = contents(tmp_path / "a")
    assert convert(tmp_path / "a", tmp_path / "a") == 1
    assert "exists and is not an empty directory" in capsys.readouterr().err
    assert contents(tmp_path / "a") == before
    (tmp_path / "b").mkdir()
    assert convert(tmp_path / "a", tmp_path / "b") == 0


def test_a_source_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert("nobody/nothing", tmp_path / "out", "--local-files-only") == 1
    assert "'nobody/nothing' is no directory here" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert convert(tmp_path / "empty", tmp_path / "out") == 1
    assert "config.json" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_head_where_none_is_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    our_folder(XLMRobertaModel, tmp_path / "a")
    assert convert(tmp_path / "a", tmp_path / "b", "--head", "topic") == 1
    assert "it names a head of a fairseq checkpoint" in capsys.readouterr().err
    assert convert(tmp_path / "a", tmp_path / "b", "--dtype", "int8") == 2
    assert "invalid choice: 'int8'" in capsys.readouterr().err
