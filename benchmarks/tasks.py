"""Named entities and question answering beside transformers: same weights, recipe and measure.

    XLMR_EXT_DATA=... python benchmarks/tasks.py --model CHECKPOINT --task tokens --seeds 1 2 3

tokens: trains on the dev part of UNER English EWT, measures entity F1 on its test part and on
German PUD (Mayhew et al. 2024, arXiv 2311.09122). qa: trains on the first 12 articles of English
XQuAD (Artetxe et al. 2020, arXiv 1910.11856), measures EM and F1 on its last 16, in English and in
German. Zero-shot across languages, small on purpose: what counts is that both sides agree.

Our side is `xlmr_ext.training.finetune`; theirs a plain PyTorch loop over transformers' model and
batches padded to their longest. Both get the same new head, AdamW, warm-up 10 % then linear decay
to 0, weight decay 0.01 on matrices, clipping at 1.0, and the same batches in the same order: what
differs is dropout's masks. Answers and entities are read from either side's logits by the same
code.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from xlmr_ext import PackedBatch, XLMRobertaTokenizer
from xlmr_ext.data import LengthBatches
from xlmr_ext.tasks.base import Features, Task
from xlmr_ext.tasks.registry import head_class, read_data, task_class
from xlmr_ext.training import finetune, seed_everything

RATE = 1e-4
RECIPES: dict[str, dict[str, Any]] = {
    "tokens": {"epochs": 4, "batch_size": 16, "max_length": 128},
    "qa": {"epochs": 3, "batch_size": 8, "max_length": 384},
}
HEADS = {"tokens": "classifier", "qa": "qa_outputs"}
THEIRS = {"tokens": "AutoModelForTokenClassification", "qa": "AutoModelForQuestionAnswering"}


def data_of(task: str, folder: Path) -> tuple[Any, dict[str, Any]]:
    """-> what to train on, and by language what to measure on."""
    if task == "tokens":
        read = [
            read_data(task, folder / "ner" / name)
            for name in (
                "uner_en_ewt/en_ewt-ud-dev.iob2",
                "uner_en_ewt/en_ewt-ud-test.iob2",
                "uner_de_pud/de_pud-ud-test.iob2",
            )
        ]
        return read[0], {"en": read[1], "de": read[2]}
    parts: dict[str, Any] = {}
    for language in ("en", "de"):
        path = folder / "xquad" / f"xquad.{language}.json"
        articles = json.loads(path.read_text("utf-8"))["data"]
        for part, chosen in (("train", articles[:12]), ("test", articles[-16:])):
            with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
                json.dump({"data": chosen}, file)
                file.flush()
                parts[f"{language} {part}"] = read_data(task, Path(file.name))
    return parts["en train"], {"en": parts["en test"], "de": parts["de test"]}


class Padded(nn.Module):
    """transformers' model behind the packed batches that the tasks make."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config
        # What our configuration tells by itself.
        self.config.longest_input = (
            self.config.max_position_embeddings - 1 - self.config.pad_token_id
        )

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def padded(self, packed: PackedBatch) -> tuple[Tensor, Tensor]:
        lengths = packed.cu_seqlens.diff()
        mask = torch.arange(packed.max_seqlen) < lengths[:, None]
        ids = torch.full(mask.shape, 1, dtype=torch.int64)
        return ids.masked_scatter(mask, packed.input_ids), mask

    def forward(self, packed: PackedBatch) -> SimpleNamespace:
        ids, mask = self.padded(packed)
        output = self.model(input_ids=ids, attention_mask=mask.long())
        names = [name for name in output if name.endswith("logits")]
        return SimpleNamespace(**{name: output[name][mask] for name in names})

    def loss(self, packed: PackedBatch, targets: list[Any]) -> Tensor:
        ids, mask = self.padded(packed)
        if hasattr(self.model, "qa_outputs"):
            start, end = torch.tensor(targets).unbind(1)
            labels = {"start_positions": start, "end_positions": end}
        else:
            flat = torch.cat([torch.as_tensor(target) for target in targets])
            labels = {"labels": torch.full(mask.shape, -100).masked_scatter(mask, flat)}
        loss: Tensor = self.model(input_ids=ids, attention_mask=mask.long(), **labels).loss
        return loss


def train_theirs(model: Padded, features: Features, recipe: dict[str, Any], seed: int) -> None:
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, fused=True)
    batches = LengthBatches(features.lengths(), recipe["batch_size"], seed=seed)
    total = recipe["epochs"] * len(batches)
    warmup, step = max(1, round(0.1 * total)), 0
    model.train()
    for epoch in range(1, recipe["epochs"] + 1):
        for examples in batches.epoch(epoch):
            rows = features.rows(examples)
            batch = PackedBatch.from_sequences([features.sequences[row] for row in rows])
            step += 1
            factor = step / warmup if step <= warmup else (total + 1 - step) / (total + 1 - warmup)
            for group in optimizer.param_groups:
                group["lr"] = RATE * factor
            model.loss(batch, [features.targets[example] for example in examples]).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    model.eval()


def draw_head(head: nn.Linear, seed: int) -> None:
    """The new head by its seed alone: from_pretrained's draws are each library's own."""
    numbers = torch.Generator().manual_seed(seed)
    nn.init.normal_(head.weight, std=0.02, generator=numbers)
    nn.init.zeros_(head.bias)


def measure(task: Task, model: Any, tests: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {
        language: task.evaluate(model, task.features(data, training=False), batch_size=32).metrics
        for language, data in tests.items()
    }


def run(arguments: argparse.Namespace, side: str, seed: int) -> dict[str, Any]:
    name, recipe = arguments.task, RECIPES[arguments.task]
    train, tests = data_of(name, Path(os.environ["XLMR_EXT_DATA"]))
    tokenizer = XLMRobertaTokenizer.from_pretrained(arguments.model)
    seed_everything(seed)
    labels = task_class(name).labels_in(train)
    settings = (
        {} if name == "qa" else {"num_labels": len(labels), "id2label": dict(enumerate(labels))}
    )
    source = arguments.trained or arguments.model
    if side == "ours":
        model = head_class(name).from_pretrained(arguments.model, **settings)
    else:
        import transformers

        # A model that transformers trained before; its labels are its own.
        settings = {} if arguments.trained else settings
        theirs = getattr(transformers, THEIRS[name]).from_pretrained(source, **settings)
        model = Padded(theirs)
    if side == "ours" or arguments.trained is None:
        draw_head(getattr(model if side == "ours" else theirs, HEADS[name]), seed)
    task = task_class(name)(model, tokenizer, max_length=recipe["max_length"])
    task.settle(train)
    started = time.monotonic()
    if side == "ours":
        finetune(
            model, tokenizer, train, task=task, output_dir=None, learning_rate=RATE, seed=seed,
            epochs=recipe["epochs"], batch_size=recipe["batch_size"],
        )  # fmt: skip
    elif arguments.trained is None:
        train_theirs(model, task.features(train, training=True), recipe, seed)
    seconds = time.monotonic() - started
    return {"side": side, "seed": seed, "seconds": seconds, **measure(task, model, tests)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="checkpoint that both sides start from")
    parser.add_argument("--task", choices=sorted(RECIPES), required=True)
    parser.add_argument(
        "--sides", nargs="+", choices=("ours", "theirs"), default=["ours", "theirs"]
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--trained", help="their model, trained before: measure it only")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for seed in arguments.seeds:
        for side in arguments.sides:
            print(json.dumps(run(arguments, side, seed)), flush=True)


if __name__ == "__main__":
    main()
