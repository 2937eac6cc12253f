"""The plan of a run: counts that are the run's, and nothing left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_heads import make_head
from xlmr_vocabulary import write_tiny_vocabulary

from xlmr_ext import XLMRobertaTokenizer
from xlmr_ext.cli import main
from xlmr_ext.training import finetune
from xlmr_ext.training.plan import finetune_plan

TEXTS = ["a", "the cat", "the cat sat on the mat", "on the mat", "the dog saw the cat"]


def data(count: int) -> list[tuple[str, str]]:
    return [(TEXTS[i % len(TEXTS)], ("ant", "bee")[i % 2]) for i in range(count)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> XLMRobertaTokenizer:
    folder = tmp_path_factory.mktemp("vocabulary")
    write_tiny_vocabulary(folder)
    return XLMRobertaTokenizer.from_pretrained(folder)


def model_of(tokenizer: XLMRobertaTokenizer) -> Any:
    kind = "XLMRobertaForSequenceClassification"
    return make_head(tokenizer, kind, ["ant", "bee"], hidden_dropout_prob=0.1)


@pytest.mark.filterwarnings("ignore::xlmr_ext.chance.ChanceWarning")
def test_counts_are_those_of_the_run(tokenizer: XLMRobertaTokenizer, tmp_path: Path) -> None:
    model = model_of(tokenizer)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(5)
    wanted = torch.rand(1)
    torch.manual_seed(5)
    recipe: dict[str, Any] = {"epochs": 2, "batch_size": 3, "output_dir": tmp_path / "out"}
    plan = finetune_plan(model, tokenizer, data(20), dev=data(5), **recipe)
    assert torch.equal(torch.rand(1), wanted)
    assert not model.training
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.iterdir()) == []
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    result = finetune(model, tokenizer, data(20), dev=data(5), progress=False, **recipe)
    assert plan.steps == result.steps
    lines = (tmp_path / "out" / "xlmr_ext_training.jsonl").read_text().splitlines()
    steps = [row for row in map(json.loads, lines) if row["event"] == "step"]
    assert plan.tokens == steps[-1]["tokens"]
    assert plan.evaluations == len(result.history)
    assert plan.memory["gradients"] == 4 * plan.trained
    assert plan.memory["optimiser's moments"] == 8 * plan.trained
    assert plan.as_row()["peak_bytes"] == sum(plan.memory.values())
    assert "in all" in plan.table()


def test_what_is_frozen_has_no_gradients(tokenizer: XLMRobertaTokenizer) -> None:
    model = model_of(tokenizer)
    options: dict[str, Any] = {"output_dir": None, "epochs": 1}
    whole = finetune_plan(model, tokenizer, data(8), **options)
    part = finetune_plan(model, tokenizer, data(8), freeze_layers=1, **options)
    layer = sum(p.numel() for p in model.roberta.encoder.layer[1:].parameters())
    head = sum(p.numel() for p in model.classifier.parameters())
    assert part.trained == layer + head < whole.trained
    with pytest.raises(ValueError, match="freeze_layers is 99"):
        finetune_plan(model, tokenizer, data(8), freeze_layers=99, **options)


def test_the_command(
    tokenizer: XLMRobertaTokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    model_of(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    train = tmp_path / "train.tsv"
    train.write_text("text\tlabel\n" + "".join(f"{t}\t{label}\n" for t, label in data(9)))
    command = ["finetune", "--model", str(folder), "--train", str(train), "--plan"]
    command += ["--output", str(tmp_path / "out"), "--report", str(tmp_path / "report")]
    before = sorted(tmp_path.rglob("*"))
    assert main([*command, "--json", "--gradient-checkpointing"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["steps"] == 5
    assert row["peak_bytes"] == sum(row["memory"].values())
    assert main([*command, "--freeze-layers", "1"]) == 0
    assert "memory at the peak" in capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before
