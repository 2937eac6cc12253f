"""Mixed lengths against uniform ones: the same work in theory, every head; milliseconds and ratios.

    python benchmarks/lengths.py

8 texts of 10 to 500 tokens, and 6 of 340: as many tokens, and as many pairs of tokens that attend
to each other, so that both batches are the same work. What the mixed one takes longer is what
padding, tails and threads that wait cost. Base shape, random weights, frozen encoder, both batches
padded and in turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import xlmr_ext

MIXED = [10, 107, 205, 240, 249, 316, 413, 500]
UNIFORM = [340] * 6
assert sum(MIXED) == sum(UNIFORM)
assert sum(n * n for n in MIXED) == sum(n * n for n in UNIFORM)
HEADS = {
    "encoder": "XLMRobertaModel",
    "sequence": "XLMRobertaForSequenceClassification",
    "tokens": "XLMRobertaForTokenClassification",
    "answers": "XLMRobertaForQuestionAnswering",
    "choice": "XLMRobertaForMultipleChoice",
}


def inputs_of(lengths: list[int], head: str, vocabulary: int) -> dict[str, Tensor]:
    """The padded batch; two choices a text for that head."""
    ids = torch.full((len(lengths), max(lengths)), 1)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(4, vocabulary - 1, (length,))
        ids[row, 0] = 0
    batch = {"input_ids": ids, "attention_mask": (ids != 1).long()}
    if head == "choice":
        batch = {name: tensor.reshape(-1, 2, ids.shape[1]) for name, tensor in batch.items()}
    return batch


def interleaved(calls: list[partial[Any]], repeats: int) -> list[list[float]]:
    """Milliseconds of each call, in turn, after one of each that does not count."""
    times: list[list[float]] = [[] for _ in calls]
    for number in range(repeats + 1):
        for call, found in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            if number:
                found.append(1e3 * (time.perf_counter() - start))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=[*HEADS])
    parser.add_argument("--dtype", choices=("float32", "int8"), default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write all numbers here")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    print(f"{xlmr_ext.build_info()['table']}, {arguments.threads} threads")
    print(f"{'head':>10} {'uniform':>13} {'mixed':>13}   ratio (median of pairs)")
    found: dict[str, Any] = {"mixed": MIXED, "uniform": UNIFORM}
    config = xlmr_ext.XLMRobertaConfig(vocab_size=20_000, num_labels=2)
    for head in arguments.heads:
        model = getattr(xlmr_ext, HEADS[head])(config).optimize_for_inference(arguments.dtype)
        calls = [
            partial(model, **inputs_of(lengths, head, config.vocab_size))
            for lengths in (UNIFORM, MIXED)
        ]
        with torch.inference_mode():
            uniform_ms, mixed_ms = interleaved(calls, arguments.repeats)
        ratio = statistics.median(m / u for u, m in zip(uniform_ms, mixed_ms, strict=True))
        found[head] = {"uniform_ms": uniform_ms, "mixed_ms": mixed_ms, "ratio": ratio}
        print(f"{head:>10} {statistics.median(uniform_ms):>10.1f} ms "
              f"{statistics.median(mixed_ms):>10.1f} ms   {ratio:.3f}", flush=True)  # fmt: skip
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
