"""The commands and programs of docs/tasks.md, run in their order in one folder of small files."""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from xlmr_vocabulary import write_tiny_vocabulary

from xlmr_ext import (
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
    XLMRobertaForSequenceClassification,
    XLMRobertaModel,
)

DOCUMENT = Path(__file__).parents[1] / "docs" / "tasks.md"
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TEXTS = {
    "travel": ["Der Zug nach Paris hat Verspätung.", "The train was full.", "Le train part."],
    "health": ["Der Arzt verschrieb etwas.", "The nurse took a sample.", "Il a de la fièvre."],
}
IOB2 = "Anna\tB-PER\nfuhr\tO\nnach\tO\nParis\tB-LOC\n.\tO\n\nDas\tO\nBuch\tO\n\n"
CONTEXT = "Anna fuhr mit dem Zug nach Paris."


def write_files(folder: Path) -> None:
    """Everything that the document's commands read."""
    torch.manual_seed(0)
    vocabulary = write_tiny_vocabulary(folder)
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(vocabulary))
    config = XLMRobertaConfig(
        vocab_size=len(pieces) + 2, hidden_size=24, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=514,
    )  # fmt: skip
    XLMRobertaModel(config).save_pretrained(folder / "base")
    XLMRobertaForMaskedLM(config).save_pretrained(folder / "language")
    config.num_labels = 3
    config.id2label = {0: "contradiction", 1: "neutral", 2: "entailment"}
    config.label2id = {name: index for index, name in config.id2label.items()}
    XLMRobertaForSequenceClassification(config).save_pretrained(folder / "nli")
    for name in ("base", "language", "nli"):
        (folder / name / vocabulary.name).write_bytes(vocabulary.read_bytes())
    vocabulary.unlink()
    for name in ("train.csv", "dev.csv", "dev-de.csv"):
        with (folder / name).open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            writer.writerows((text, label) for label, texts in TEXTS.items() for text in texts)
    lines = "".join(f"{text}\n" for texts in TEXTS.values() for text in texts)
    for name in ("new.txt", "docs.txt"):
        (folder / name).write_text(lines, encoding="utf-8")
    masked = "".join(f"{text.split()[0]} <mask>.\n" for texts in TEXTS.values() for text in texts)
    (folder / "masked.txt").write_text(masked, encoding="utf-8")
    (folder / "corpus").mkdir()
    (folder / "corpus" / "en.txt").write_text(lines * 4, encoding="utf-8")
    (folder / "corpus" / "de.txt.gz").write_bytes(gzip.compress(lines.encode()))
    (folder / "entities.iob2").write_text(IOB2 * 2, encoding="utf-8")
    answer = {"text": "Paris", "answer_start": CONTEXT.index("Paris")}
    question = {"id": "1", "question": "Wohin fuhr Anna?", "answers": [answer]}
    paragraph = {"context": CONTEXT, "qas": [question]}
    squad = {"version": "1.1", "data": [{"title": "t", "paragraphs": [paragraph]}]}
    (folder / "questions.json").write_text(json.dumps(squad), encoding="utf-8")
    rows = [
        {"context": CONTEXT, "choices": ["Der Zug war voll.", "Das Buch ist rot."], "label": label}
        for label in (0, 1)
    ]
    (folder / "choices.jsonl").write_text(
        "".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8"
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_command_and_program_of_the_document_runs(tmp_path: Path) -> None:
    write_files(tmp_path)
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    # The command under the name that the document has for it, whether it is installed or not.
    command = scripts / "xlmr-ext"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m xlmr_ext "$@"\n')
    command.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    blocks = BLOCK.findall(DOCUMENT.read_text("utf-8"))
    assert len(blocks) > 10
    for language, text in blocks:
        program = (
            ["bash", "-euo", "pipefail", "-c", text]
            if language == "sh"
            else [sys.executable, "-c", text]
        )
        result = subprocess.run(
            program, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
        )
        assert result.returncode == 0, f"{text}\n{result.stdout}\n{result.stderr}"
    for produced in (
        "report/index.html", "by-language/index.html", "labelled.tsv", "found.jsonl", "tagged.iob2",
        "predictions.json", "chosen.jsonl", "new.npy", "topics-fairseq/model.pt",
        "topics-again/model.safetensors", "topics-int8/frozen.safetensors",
    ):  # fmt: skip
        assert (tmp_path / produced).stat().st_size > 0, produced
    assert json.loads((tmp_path / "predictions.json").read_text("utf-8")).keys() == {"1"}
