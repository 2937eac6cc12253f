"""The job people do, against transformers in turn: fine-tune on English, label other languages.

    XLMR_EXT_DATA=... python benchmarks/sib200.py --model CHECKPOINT --seeds 1 2 3

SIB-200 in $XLMR_EXT_DATA/sib200/<language>/{train,dev,test}.tsv (Adelani et al. 2024, arXiv
2309.07445). Our side is the command line: `xlmr-ext finetune`, then `xlmr-ext predict` per
language. Theirs is a plain loop of the same recipe in this file: AdamW, learning rate 5e-5, warm-up
10 % then linear decay, weight decay 0.01, clipping at 1.0, batches of 16 padded to their longest, 5
epochs, at most 128 tokens, the best epoch by dev accuracy. Each side runs in processes of its own;
the time is all of it, start-up included, the memory the largest resident set of any of them.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LANGUAGES = ("deu_Latn", "fra_Latn", "spa_Latn", "rus_Cyrl", "zho_Hans", "arb_Arab")
EPOCHS, BATCH, RATE, LENGTH = 5, 16, 5e-5, 128


def rows_of(path: Path) -> list[tuple[str, str]]:
    """(text, label) of a SIB-200 file."""
    lines = path.read_text(encoding="utf-8").split("\n")[1:]
    cells = [line.split("\t") for line in lines if line]
    return [(text, label) for _, label, text in cells]


def run(command: list[str]) -> float:
    """Runs a command to its end; -> peak resident memory in GB."""
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return usage.ru_maxrss / 1e6


def accuracy(predicted: Path, gold: Path) -> float:
    with predicted.open(encoding="utf-8", newline="") as file:
        labels = [row[0] for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)][1:]
    wanted = [label for _, label in rows_of(gold)]
    assert len(labels) == len(wanted), (len(labels), len(wanted))
    return 100 * sum(a == b for a, b in zip(labels, wanted, strict=True)) / len(wanted)


def ours(arguments: argparse.Namespace, data: Path, output: Path, seed: int) -> float:
    command = [sys.executable, "-m", "xlmr_ext"]
    shared = ["--label-column", "category", "--threads", str(arguments.threads)]
    train, dev = (str(data / "eng_Latn" / f"{part}.tsv") for part in ("train", "dev"))
    peak = run(
        [*command, "finetune", "--model", arguments.model, "--train", train, "--dev", dev,
         "--output", str(output / "model"), "--seed", str(seed), "--epochs", str(EPOCHS),
         "--batch-size", str(BATCH), "--learning-rate", str(RATE), "--max-length", str(LENGTH),
         *shared]
    )  # fmt: skip
    for language in ("eng_Latn", *LANGUAGES):
        test = str(data / language / "test.tsv")
        peak = max(peak, run(
            [*command, "predict", "--model", str(output / "model"), "--input", test, "--output",
             str(output / f"{language}.tsv"), *shared]
        ))  # fmt: skip
    return peak


def theirs(arguments: argparse.Namespace, data: Path, output: Path, seed: int) -> float:
    return run(
        [sys.executable, __file__, "--model", arguments.model, "--threads",
         str(arguments.threads), "--seeds", str(seed), "--transformers-output", str(output)]
    )  # fmt: skip


def train_with_transformers(model_name: str, data: Path, output: Path, seed: int) -> None:
    import numpy as np
    import torch
    import transformers

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    train, dev = (rows_of(data / "eng_Latn" / f"{part}.tsv") for part in ("train", "dev"))
    labels = sorted({label for _, label in train})
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_name)
    model = transformers.XLMRobertaForSequenceClassification.from_pretrained(
        model_name, num_labels=len(labels)
    )
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}], lr=RATE
    )
    total = EPOCHS * ((len(train) + BATCH - 1) // BATCH)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, total // 10, total)

    def batch(rows: list[tuple[str, str]]) -> dict[str, torch.Tensor]:
        return tokenizer(
            [text for text, _ in rows], truncation=True, max_length=LENGTH, padding=True,
            return_tensors="pt",
        )  # fmt: skip

    def label(rows: list[tuple[str, str]]) -> list[str]:
        model.eval()
        found: list[str] = []
        with torch.inference_mode():
            for start in range(0, len(rows), 32):
                logits = model(**batch(rows[start : start + 32])).logits
                found += [labels[i] for i in logits.argmax(1).tolist()]
        return found

    best, weights = -1.0, None
    for _ in range(EPOCHS):
        model.train()
        random.shuffle(train)
        for start in range(0, len(train), BATCH):
            rows = train[start : start + BATCH]
            target = torch.tensor([labels.index(label) for _, label in rows])
            model(**batch(rows), labels=target).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        score = sum(a == b for a, (_, b) in zip(label(dev), dev, strict=True)) / len(dev)
        if score > best:
            best = score
            weights = {name: t.clone() for name, t in model.state_dict().items()}
    model.load_state_dict(weights)
    for language in ("eng_Latn", *LANGUAGES):
        found = label(rows_of(data / language / "test.tsv"))
        (output / f"{language}.tsv").write_text("\n".join(["label", *found]) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a checkpoint's directory")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=("xlmr_ext", "transformers"))
    parser.add_argument("--transformers-output", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    data = Path(os.environ["XLMR_EXT_DATA"]) / "sib200"
    if arguments.transformers_output is not None:
        import torch

        torch.set_num_threads(arguments.threads)
        train_with_transformers(
            arguments.model, data, arguments.transformers_output, arguments.seeds[0]
        )
        return
    sides = {"xlmr_ext": ours, "transformers": theirs}
    print(f"{'seed':>4} {'':>12} {'seconds':>8} {'GB':>5} {'eng':>5} {'mean':>5}  "
          f"{' '.join(f'{x[:3]:>5}' for x in LANGUAGES)}", flush=True)  # fmt: skip
    for seed in arguments.seeds:
        for name, side in sides.items():
            if arguments.only not in (None, name):
                continue
            with tempfile.TemporaryDirectory() as folder:
                began = time.perf_counter()
                peak = side(arguments, data, Path(folder), seed)
                seconds = time.perf_counter() - began
                scores = [
                    accuracy(Path(folder) / f"{x}.tsv", data / x / "test.tsv")
                    for x in ("eng_Latn", *LANGUAGES)
                ]
            mean = sum(scores[1:]) / len(LANGUAGES)
            print(f"{seed:>4} {name:>12} {seconds:>8.0f} {peak:>5.2f} {scores[0]:>5.1f} "
                  f"{mean:>5.1f}  {' '.join(f'{x:>5.1f}' for x in scores[1:])}",
                  flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
