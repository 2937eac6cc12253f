"""Fine-tunes a classifier of sentences with a training loop of its own, the way tutorials do.

usage: classify_with_a_loop.py MODEL TRAIN.csv TEST.csv OUTPUT

The csv files have the columns text and label. Written for transformers; with xlmr_ext the second
import changes, nothing else.
"""

import csv
import sys

import torch
from torch.utils.data import DataLoader
from transformers import XLMRobertaForSequenceClassification, XLMRobertaTokenizer
from transformers import get_linear_schedule_with_warmup


def read(path):
    with open(path, newline="", encoding="utf-8") as file:
        return [(row["text"], row["label"]) for row in csv.DictReader(file)]


def main(name, train_file, test_file, output):
    torch.manual_seed(1)
    train, test = read(train_file), read(test_file)
    labels = sorted({label for _, label in train})
    tokenizer = XLMRobertaTokenizer.from_pretrained(name)
    model = XLMRobertaForSequenceClassification.from_pretrained(name, num_labels=len(labels))

    def collate(rows):
        batch = tokenizer(
            [text for text, _ in rows],
            padding="longest",
            truncation=True,
            max_length=64,
            return_tensors="pt",
        )
        batch["labels"] = torch.tensor([labels.index(label) for _, label in rows])
        return batch

    epochs, losses = 3, []
    batches = DataLoader(train, batch_size=8, shuffle=True, collate_fn=collate)
    decayed = [p for n, p in model.named_parameters() if "bias" not in n and "LayerNorm" not in n]
    others = [p for n, p in model.named_parameters() if "bias" in n or "LayerNorm" in n]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}],
        lr=1e-2,
    )
    schedule = get_linear_schedule_with_warmup(optimizer, 2, epochs * len(batches))
    device = torch.device("cpu")
    model.to(device)
    for _ in range(epochs):
        model.train()
        for batch in batches:
            outputs = model(**batch.to(device))
            outputs.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(outputs.loss.item())

    model.eval()
    rows, right = [], 0
    with torch.no_grad():
        for batch in DataLoader(test, batch_size=8, collate_fn=collate):
            wanted = batch.pop("labels")
            logits = model(**batch)[0]
            rows += logits.tolist()
            right += int((logits.argmax(-1) == wanted).sum())
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    again = XLMRobertaForSequenceClassification.from_pretrained(output)
    text = tokenizer("Le petit chat", return_tensors="pt")
    assert torch.equal(again(**text).logits, model(**text).logits)
    return {"losses": losses, "accuracy": right / len(test), "logits": rows, "labels": labels}


if __name__ == "__main__":
    print(main(*sys.argv[1:5]))
