"""The encoder against transformers in one process, in turn: milliseconds and ratios.

    python benchmarks/encoder.py                      # forward, base shape, all batches
    python benchmarks/encoder.py --train 8x128        # forward and backward

Random weights, 3 labels, eval mode (training mode without dropout for --train), float32. Both sides
are held to one instruction set, --isa avx2 unless said otherwise: the limits are environment
variables that the libraries read once, so the script sets them and starts itself again. It prints
what each library says of itself, and the rate of one matrix product, so that the limit can be seen
to act.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

BATCHES = ("1x16", "1x128", "1x512", "8x128", "32x32", "ragged")
# XLMR_EXT_ISA, ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA, MKL_ENABLE_INSTRUCTIONS
LIMITS = {
    "avx2": ("avx2", "avx2", "AVX2", "AVX2"),
    "avx512": ("avx512", "avx512", "AVX512_CORE", "AVX512"),
    "none": ("", "", "", ""),
}
VARIABLES = (
    "XLMR_EXT_ISA",
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "MKL_ENABLE_INSTRUCTIONS",
)


def limit(isa: str) -> None:
    """Starts this script again under the instruction set's environment."""
    if os.environ.get("XLMR_EXT_BENCHMARK_ISA") == isa:
        return
    os.environ["XLMR_EXT_BENCHMARK_ISA"] = isa
    for name, value in zip(VARIABLES, LIMITS[isa], strict=True):
        if value:
            os.environ[name] = value
        else:
            os.environ.pop(name, None)
    os.execv(sys.executable, [sys.executable, *sys.argv])


def lengths_of(batch: str) -> list[int]:
    """ "8x128" is 8 rows of 128 tokens; "ragged" 32 rows of 5 to 55 tokens, 785 in all."""
    if batch != "ragged":
        rows, length = (int(x) for x in batch.split("x"))
        return [length] * rows
    lengths = [5 + 50 * i // 31 for i in range(32)]
    surplus = sum(lengths) - 785
    middle = range(1, 31)
    for step in range(abs(surplus)):
        lengths[middle[step % len(middle)]] -= 1 if surplus > 0 else -1
    return lengths


def interleaved(sides: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, the sides in turn, after one call of each that does not count."""
    for call in sides.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, call in sides.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("batches", nargs="*", default=list(BATCHES), help="e.g. 8x128 ragged")
    parser.add_argument("--train", action="store_true", help="forward and backward")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--isa", choices=sorted(LIMITS), default="avx2")
    arguments = parser.parse_args()
    limit(arguments.isa)

    import torch
    import transformers

    import xlmr_ext

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    theirs = transformers.XLMRobertaForSequenceClassification(
        transformers.XLMRobertaConfig(
            vocab_size=250002, max_position_embeddings=514, type_vocab_size=1, num_labels=3,
            layer_norm_eps=1e-5, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            attn_implementation="sdpa",
        )
    )  # fmt: skip
    ours = xlmr_ext.XLMRobertaForSequenceClassification(
        xlmr_ext.XLMRobertaConfig(
            num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
    )
    ours.load_state_dict(theirs.state_dict())
    theirs.train(arguments.train)
    if arguments.train:
        ours.train()
    else:
        ours.optimize_for_inference()  # as `predict` runs it

    def forward(model: torch.nn.Module, inputs: dict[str, Any], labels: torch.Tensor) -> None:
        with torch.inference_mode():
            model(**inputs)

    def train(model: torch.nn.Module, inputs: dict[str, Any], labels: torch.Tensor) -> None:
        model.zero_grad(set_to_none=True)
        model(**inputs, labels=labels).loss.backward()

    info = xlmr_ext.build_info()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, "
          f"{arguments.threads} threads; ATen {torch.backends.cpu.get_cpu_capability()}, "
          f"xlmr_ext table {info['table']}")  # fmt: skip
    a, b = torch.randn(1024, 768), torch.randn(3072, 768)
    product = interleaved({"torch": lambda: torch.nn.functional.linear(a, b)}, 9)["torch"]
    print(f"torch's product of 1024x768 by 768x3072: "
          f"{2 * 1024 * 768 * 3072 / statistics.median(product) / 1e9:.0f} GFLOP/s")  # fmt: skip
    print(f"{'batch':>8} {'transformers':>14} {'xlmr_ext':>10}   ratio (median of pairs)")

    for batch in arguments.batches:
        lengths = lengths_of(batch)
        longest = max(lengths)
        ids = torch.full((len(lengths), longest), 1)
        mask = torch.zeros_like(ids)
        for row, length in enumerate(lengths):
            ids[row, :length] = torch.randint(4, 250001, (length,))
            ids[row, 0], mask[row, :length] = 0, 1
        inputs = {"input_ids": ids, "attention_mask": mask}
        labels = torch.arange(len(lengths)) % 3

        times = interleaved(
            {
                name: partial(train if arguments.train else forward, model, inputs, labels)
                for name, model in (("transformers", theirs), ("xlmr_ext", ours))
            },
            arguments.repeats,
        )
        pairs = zip(times["transformers"], times["xlmr_ext"], strict=True)
        ratio = statistics.median(t / o for t, o in pairs)
        medians = {name: 1e3 * statistics.median(t) for name, t in times.items()}
        print(f"{batch:>8} {medians['transformers']:>11.1f} ms {medians['xlmr_ext']:>7.1f} ms   "
              f"{ratio:.2f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
