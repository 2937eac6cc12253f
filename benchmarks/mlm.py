"""The masked-LM head beside transformers': milliseconds and memory of a forward and a backward.

    python benchmarks/mlm.py
    python benchmarks/mlm.py --labelled 0.15 --rounds 7 --json mlm.json

Both heads have the same weights and get the same hidden states [8, 512, 768] and labels: all of
them (--labelled 1) or a share. A call computes the loss and the gradients of the states, the head
and the tied matrix. Calls of both sides alternate, after one of each whose time does not count; the
figures are medians, and the ratios those of the pairs. Beside the time there is the processor's,
of all threads together, which on a busy machine says more. Memory is the most that a call had
resident beyond what was there before it, less the tied matrix's gradient.
transformers' side needs 18 GB.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import xlmr_ext
from xlmr_ext import _launch
from xlmr_ext.losses import IGNORED


def models(vocabulary: int, hidden: int) -> tuple[Any, Any]:
    """Ours and transformers', of the same weights; the encoder is only there to be complete."""
    import transformers

    config = xlmr_ext.XLMRobertaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=1,
        num_attention_heads=hidden // 64 or 1,
        intermediate_size=hidden,
    )
    ours = xlmr_ext.XLMRobertaForMaskedLM(config)
    theirs = transformers.XLMRobertaForMaskedLM(transformers.XLMRobertaConfig(**config.to_dict()))
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def our_loss(model: Any, states: Tensor, labels: Tensor) -> Tensor:
    loss: Tensor = model._loss(states, labels, None)
    return loss


def their_loss(model: Any, states: Tensor, labels: Tensor) -> Tensor:
    """What transformers' forward does behind the encoder."""
    scores = model.lm_head(states)
    loss: Tensor = nn.CrossEntropyLoss()(scores.view(-1, scores.shape[-1]), labels.view(-1))
    return loss


def resident(name: str) -> int:
    """Bytes of VmRSS or VmHWM."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if name in x)
    return 1024 * int(line.split()[1])


def step(
    loss: Callable[[Any, Tensor, Tensor], Tensor], model: Any, states: Tensor, labels: Tensor
) -> tuple[float, float, float, float, int]:
    """-> seconds of the forward, of the backward, of the processor, the loss, peak bytes beyond
    those before."""
    model.zero_grad(set_to_none=True)
    states.grad = None
    # What calls before left with the allocator and as workspace would hide this one's.
    _launch._workspace.buffer = torch.empty(0, dtype=torch.uint8)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    processor = time.process_time()
    start = time.perf_counter()
    value = loss(model, states, labels)
    middle = time.perf_counter()
    value.backward()
    end = time.perf_counter()
    processor = time.process_time() - processor
    peak = resident("VmHWM") - before
    model.zero_grad(set_to_none=True)
    return middle - start, end - middle, processor, value.item(), peak


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, nargs=2, default=[8, 512], metavar=("TEXTS", "TOKENS"))
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--vocabulary", type=int, default=250_002)
    parser.add_argument("--labelled", type=float, nargs="+", default=[1.0, 0.15])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--alone", action="store_true", help="without transformers")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    ours, theirs = models(arguments.vocabulary, arguments.hidden)
    matrix = ours.lm_head.decoder.weight
    tied = matrix.numel() * matrix.element_size()
    sides = {"ours": (our_loss, ours), "transformers": (their_loss, theirs)}
    if arguments.alone:
        del sides["transformers"], theirs
    states = torch.randn(*arguments.batch, arguments.hidden, requires_grad=True)
    print(f"{xlmr_ext.build_info()['table']}, {arguments.threads} threads, vocabulary "
          f"{arguments.vocabulary}, hidden {arguments.hidden}")  # fmt: skip
    found: dict[str, Any] = {}
    for share in arguments.labelled:
        labels = torch.randint(arguments.vocabulary, arguments.batch)
        labels[torch.rand(labels.shape) >= share] = IGNORED
        count = int((labels != IGNORED).sum())
        runs: dict[str, list[tuple[float, float, float, float, int]]] = {n: [] for n in sides}
        for number in range(arguments.rounds + 1):
            for name, (loss, model) in sides.items():
                run = step(loss, model, states, labels)
                if number:
                    runs[name].append(run)
        print(f"{count} of {labels.numel()} tokens labelled")
        for name, rows in runs.items():
            forward, backward, processor, value, peak = map(
                statistics.median, zip(*rows, strict=True)
            )
            print(f"{name:>14} {1e3 * forward:>8.0f} ms forward {1e3 * backward:>8.0f} ms backward "
                  f"{1e3 * processor:>8.0f} ms of processors  loss {value:.6f} "
                  f"{(peak - tied) / 1e6:>7.0f} MB", flush=True)  # fmt: skip
        if "transformers" in runs:
            pairs = [*zip(runs["ours"], runs["transformers"], strict=True)]
            ratio = statistics.median((b[0] + b[1]) / (a[0] + a[1]) for a, b in pairs)
            of_processor = statistics.median(b[2] / a[2] for a, b in pairs)
            print(f"{'':>14} {ratio:.2f} times as fast, {of_processor:.2f} by the processor's time")
        found[str(share)] = {"labelled": count, "tied_bytes": tied, **runs}
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
