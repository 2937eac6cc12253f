"""The tokenizer beside the tokenizers library: tokens per second on one and on two threads.

    python benchmarks/tokenizer.py --model DIR --data sib200

Both read the same texts, all languages of SIB-200, in one process and in turn; the median of the
rounds counts. The tokenizers library reads its number of threads once, so every number of threads
has a process of its own. Ids: rows of ids with special tokens, ours as numpy arrays, theirs as
lists by its quicker call that computes no offsets. Offsets: ids and spans as lists on both sides.
Its cache of words is warm after the first round, which does not count.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def read_texts(folder: Path) -> list[str]:
    """The third column of every language's files."""
    texts = []
    for path in sorted(folder.glob("*/*.tsv")):
        lines = path.read_bytes().decode().split("\n")[1:]
        texts += [line.split("\t")[2] for line in lines if line]
    if not texts:
        raise SystemExit(f"no */*.tsv in {folder}")
    return texts


def measure(model: str, data: Path, threads: int, rounds: int) -> None:
    """One number of threads, in this process."""
    import tokenizers
    import transformers

    import xlmr_ext

    texts = read_texts(data)
    ours = xlmr_ext.XLMRobertaTokenizer.from_pretrained(model)
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        theirs = transformers.AutoTokenizer.from_pretrained(folder).backend_tokenizer

    def their_offsets() -> list[Any]:
        return [(row.ids, row.offsets) for row in theirs.encode_batch(texts)]

    calls: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "ids": (
            lambda: ours.encode_batch(texts, num_threads=threads),
            lambda: [row.ids for row in theirs.encode_batch_fast(texts)],
        ),
        "offsets": (lambda: ours(texts, return_offsets_mapping=True), their_offsets),
    }
    tokens = sum(map(len, ours.encode_batch(texts)))
    for name, sides in calls.items():
        times: tuple[list[float], list[float]] = ([], [])
        for number in range(rounds + 1):
            for side, call in zip(times, sides, strict=True):
                start = time.perf_counter()
                call()
                if number:
                    side.append(time.perf_counter() - start)
        mine, other = (statistics.median(side) for side in times)
        print(
            f"{threads} thread{'s' * (threads > 1)}  {name:8}  xlmr_ext "
            f"{tokens / mine / 1e6:6.2f} M tokens/s   tokenizers {tokenizers.__version__} "
            f"{tokens / other / 1e6:6.2f} M tokens/s   ratio {other / mine:.2f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="directory with the vocabulary")
    parser.add_argument("--data", type=Path, required=True, help="SIB-200's folder")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        measure(arguments.model, arguments.data, arguments.one, arguments.rounds)
        return
    for threads in arguments.threads:
        environment = {
            **os.environ,
            "RAYON_NUM_THREADS": str(threads),
            "TOKENIZERS_PARALLELISM": "true" if threads > 1 else "false",
            "OMP_NUM_THREADS": str(threads),
        }
        subprocess.run(
            [sys.executable, *sys.argv, "--one", str(threads)], env=environment, check=True
        )


if __name__ == "__main__":
    main()
