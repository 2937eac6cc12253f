"""Fine-tunes a classifier of sentences with transformers' Trainer, the way tutorials do.

usage: classify_with_trainer.py MODEL TRAIN.csv TEST.csv OUTPUT

The csv files have the columns text and label. Written for transformers; with xlmr_ext the second
import changes, nothing else.
"""

import csv
import sys

import numpy as np
import torch
from transformers import XLMRobertaForSequenceClassification, XLMRobertaTokenizer
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments, set_seed


class Sentences(torch.utils.data.Dataset):
    """Tokenized rows; padding is left to the collator."""

    def __init__(self, path, tokenizer, label2id):
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        self.encodings = tokenizer([row["text"] for row in rows], truncation=True, max_length=64)
        self.labels = [label2id[row["label"]] for row in rows]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        item = {name: values[index] for name, values in self.encodings.items()}
        return {**item, "label": self.labels[index]}


def compute_metrics(prediction):
    logits, labels = prediction
    return {"accuracy": float((np.argmax(logits, axis=-1) == labels).mean())}


def main(name, train_file, test_file, output):
    set_seed(1)
    with open(train_file, newline="", encoding="utf-8") as file:
        labels = sorted({row["label"] for row in csv.DictReader(file)})
    label2id = {label: index for index, label in enumerate(labels)}
    tokenizer = XLMRobertaTokenizer.from_pretrained(name)
    model = XLMRobertaForSequenceClassification.from_pretrained(
        name, num_labels=len(labels), id2label=dict(enumerate(labels)), label2id=label2id
    )
    train = Sentences(train_file, tokenizer, label2id)
    test = Sentences(test_file, tokenizer, label2id)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=output,
            num_train_epochs=3,
            per_device_train_batch_size=8,
            per_device_eval_batch_size=8,
            learning_rate=1e-2,
            weight_decay=0.01,
            eval_strategy="epoch",
            save_strategy="epoch",
            load_best_model_at_end=True,
            metric_for_best_model="accuracy",
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=train,
        eval_dataset=test,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=compute_metrics,
    )
    trainer.train()
    metrics = trainer.evaluate()
    predictions = trainer.predict(test)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    inputs = tokenizer(["The quick brown fox", "Le petit chat"], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "accuracy": metrics["eval_accuracy"],
        "logits": predictions.predictions.tolist(),
        "labels": [model.config.id2label[index] for index in logits.argmax(-1).tolist()],
    }


if __name__ == "__main__":
    print(main(*sys.argv[1:5]))
