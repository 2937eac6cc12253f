"""What the processor can do at most, and how near each function of xlmr_ext comes.

    python benchmarks/roofline.py                       # base shape, 8x128, forward
    python benchmarks/roofline.py 1x16 ragged --backward
    XLMR_EXT_ISA=avx2 python benchmarks/roofline.py     # one kernel table

Peaks of multiply-adds and of reading are measured by roofline.cpp, built with c++ at the start.
Then every function of a layer runs by itself, in turn, on a case's tokens. "of roof" is the time
that its arithmetic at the peak, or its least traffic at the memory's rate, would need, over its
time; what lies in caches can exceed the memory's rate. The last rows are whole passes: the frozen
encoder over its packed weights, which the functions by themselves pack in every call.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peers.cases import Shape, lengths_of
from peers.machine import busy_seconds, machine

FLOAT = 4


@dataclass(frozen=True)
class Work:
    """A function's call and what it has to do at least.

    Attributes:
        times: how often a pass calls it.
        flops: operations of its products; 0 for functions that only move numbers.
        bytes: operands and results, each once.
    """

    name: str
    times: int
    flops: float
    bytes: float
    call: Callable[[], Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", default=["8x128"], help="default 8x128")
    parser.add_argument("--backward", action="store_true", help="the functions' backwards, too")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.03, help="least time of a turn")
    parser.add_argument("--output", type=Path, help="writes this file: JSON")
    for size in ("layers", "hidden", "heads", "inner"):
        parser.add_argument(f"--{size}", type=int, default=getattr(Shape, size))
    arguments = parser.parse_args()
    shape = Shape(arguments.layers, arguments.hidden, arguments.heads, arguments.inner, 1000)
    try:
        cases = {case: lengths_of(case) for case in arguments.cases}
    except ValueError as error:
        parser.error(str(error))

    peaks = measured_peaks(arguments.threads)
    print(machine()["processor"])
    for name, value in peaks.items():
        what, _, threads = name.rpartition(" ")
        unit = "GB/s" if what.startswith("read") else "Gop/s"
        print(f"{what:>20}, {threads} thread(s): {value:8.1f} {unit}")

    import torch

    import xlmr_ext

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    table = xlmr_ext.build_info()["table"]
    results: dict[str, Any] = {
        "machine": machine(), "threads": arguments.threads, "table": table,
        "xlmr_ext": xlmr_ext.__version__, "peaks": peaks, "cases": {},
    }  # fmt: skip
    for case, lengths in cases.items():
        functions = works(shape, lengths, arguments.backward)
        wholes = passes(shape, lengths, arguments.backward)
        start = time.perf_counter()
        busy, own = busy_seconds(), time.process_time()
        seconds = in_turn(functions, arguments) | in_turn(wholes, arguments)
        elsewhere = busy_seconds() - busy - (time.process_time() - own)
        elsewhere = max(0.0, elsewhere) / (time.perf_counter() - start)
        rows = [
            row(work, seconds[work.name], peaks, table, arguments.threads)
            for work in functions + wholes
        ]
        parts = rows[: len(functions)]
        total = sum(part["milliseconds"] * part["times"] for part in parts)
        for part in parts:
            part["share"] = part["milliseconds"] * part["times"] / total
        results["cases"][case] = {"functions": rows, "elsewhere": elsewhere}
        print(f"\n{case}, {sum(lengths)} tokens, {arguments.threads} threads, table {table}; "
              f"other processes had {elsewhere:.0%} of a processor")  # fmt: skip
        print(text(rows))
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")


def measured_peaks(threads: int) -> dict[str, float]:
    """roofline.cpp's answer: "fma avx2 1" is 1e9 operations a second on one thread."""
    source = Path(__file__).with_name("roofline.cpp")
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "roofline"
        subprocess.run(
            ["c++", "-std=c++17", "-O3", "-pthread", str(source), "-o", str(program)], check=True
        )
        answer = subprocess.run([program, str(threads)], check=True, stdout=subprocess.PIPE)
    return json.loads(answer.stdout)  # type: ignore[no-any-return]


def peak_of(peaks: dict[str, float], kind: str, table: str, threads: int) -> float:
    """1e9 operations a second of the instructions that a kernel table uses."""
    names = {"float32": ["fma"], "int8": ["int8"]}[kind]
    names += [f"{names[0]} {table}", f"{names[0]} {table.partition('_')[0]}"]
    found = [peaks[f"{name} {threads}"] for name in names if f"{name} {threads}" in peaks]
    return max(found, default=0.0)


def works(shape: Shape, lengths: list[int], backward: bool) -> list[Work]:
    """A pass's functions over sequences of these lengths, in torch's default type and device."""
    import torch

    from xlmr_ext import ops

    size = torch.get_default_dtype().itemsize
    n, h, inner, heads = sum(lengths), shape.hidden, shape.inner, shape.heads
    squares = sum(length * length for length in lengths)
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    longest, scale = max(lengths), (h // heads) ** -0.5
    x, residual, pre_grad = torch.randn(n, h), torch.randn(n, h), torch.randn(n, 3 * h)
    parts = [0.02 * torch.randn(h, h) for _ in range(3)]
    biases = [torch.randn(h) for _ in range(3)]
    up, down = 0.02 * torch.randn(inner, h), 0.02 * torch.randn(h, inner)
    up_bias, down_bias = torch.randn(inner), torch.randn(h)
    gain, shift = torch.ones(h), torch.zeros(h)
    ids = torch.randint(4, 1000, (n,))
    positions = torch.cat([torch.arange(2, length + 2) for length in lengths])
    word, position, kind = torch.randn(1000, h), torch.randn(514, h), torch.randn(1, h)
    query, key, value = pre_grad.split(h, 1)

    def attention() -> Any:
        return ops.attention_forward(
            query, key, value, cu, longest, heads, scale, 0.0, 0, None
        )  # fmt: skip

    def feed_forward() -> Any:
        return ops.feed_forward_forward(
            x, up, up_bias, down, down_bias, None, None, "gelu", backward
        )  # fmt: skip

    def norm() -> Any:
        return ops.layer_norm_forward(x, residual, gain, shift, 1e-5, 0.0, 0, None, backward)

    def embedding() -> Any:
        return ops.embedding_forward(
            ids, None, positions, None, word, position, kind, gain, shift, 1e-5, 0.0, 0, None
        )  # fmt: skip

    layers, projection, row = shape.layers, 2.0 * n * h * h, size * n * h
    found = [
        Work("query, key, value", layers, 3 * projection, 4 * row + 3 * size * h * h,
             lambda: ops.linear_forward(x, parts, biases, None, "none")),
        Work("attention", layers, 4.0 * squares * h, 4 * row, attention),
        Work("attention's output", layers, projection, 2 * row + size * h * h,
             lambda: ops.linear_forward(x, parts[:1], biases[:1], None, "none")),
        Work("feed-forward", layers, 4.0 * n * h * inner, 2 * row + 2 * size * h * inner,
             feed_forward),
        Work("residual + LayerNorm", 2 * layers, 0, 3 * row, norm),
        Work("embedding", 1, 0, 3 * row, embedding),
    ]  # fmt: skip
    if not backward:
        return found
    out, lse = attention()
    _, pre = feed_forward()
    _, sums, mean, rstd = norm()
    _, word_mean, word_rstd = embedding()
    grads = [torch.randn(n, h) for _ in range(3)]
    both = 2 * projection
    return [
        *found,
        Work("query, key, value'", layers, 3 * both, 5 * row + 6 * size * h * h,
             lambda: ops.linear_backward(grads, x, parts, None, "none", True, True, True)),
        Work("attention'", layers, 10.0 * squares * h, 8 * row,
             lambda: ops.attention_backward(grads[0], query, key, value, out, lse, cu, longest,
                                            heads, scale, 0.0, 0, None)),
        Work("attention's output'", layers, both, 3 * row + 2 * size * h * h,
             lambda: ops.linear_backward(grads[:1], x, parts[:1], None, "none", True, True, True)),
        Work("feed-forward'", layers, 8.0 * n * h * inner,
             3 * row + size * n * inner + 4 * size * h * inner,
             lambda: ops.feed_forward_backward(grads[0], x, up, down, pre, "gelu", True, True, True,
                                               True, True, False)),
        Work("residual + LayerNorm'", 2 * layers, 0, 3 * row,
             lambda: ops.layer_norm_backward(grads[0], sums, mean, rstd, gain, 0.0, 0, None, True)),
        Work("embedding'", 1, 0, 4 * row,
             lambda: ops.embedding_backward(grads[0], ids, None, positions, None, word, position,
                                            kind, gain, word_mean, word_rstd, 1, 0.0, 0, None, True,
                                            True, True, True)),
    ]  # fmt: skip


def passes(shape: Shape, lengths: list[int], backward: bool) -> list[Work]:
    """Whole passes of a model with a small vocabulary."""
    import torch

    import xlmr_ext

    config = xlmr_ext.XLMRobertaConfig(
        vocab_size=shape.vocabulary, num_hidden_layers=shape.layers, hidden_size=shape.hidden,
        num_attention_heads=shape.heads, intermediate_size=shape.inner,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    rows = [[0, *torch.randint(4, shape.vocabulary, (length - 1,)).tolist()] for length in lengths]
    batch = xlmr_ext.PackedBatch.from_sequences(rows)
    flops = float(shape.flops(lengths))
    weights = shape.layers * (4 * shape.hidden**2 + 2 * shape.hidden * shape.inner)
    found = []
    for dtype in ("float32", "int8"):
        model = xlmr_ext.XLMRobertaModel(config).eval()
        try:
            if dtype == "float32":
                model.optimize_for_inference()
            else:
                model.optimize_for_inference(dtype=dtype)
        except TypeError:
            continue  # a version without int8
        size = FLOAT if dtype == "float32" else 1

        def forward(model: Any = model) -> None:
            with torch.inference_mode():
                model(packed=batch)

        found.append(Work(f"frozen encoder, {dtype}", 1, flops, size * weights, forward))
    if backward:
        model = xlmr_ext.XLMRobertaModel(config)

        def train() -> None:
            model.zero_grad(set_to_none=True)
            model(packed=batch).last_hidden_state.sum().backward()

        found.append(Work("forward and backward", 1, 3 * flops, 3 * FLOAT * weights, train))
    return found


def in_turn(works: list[Work], arguments: argparse.Namespace) -> dict[str, float]:
    """Median seconds of a call, the functions in turn."""
    turns: dict[str, list[float]] = {work.name: [] for work in works}
    for work in works:
        work.call()
    for _ in range(arguments.rounds):
        for work in works:
            seconds: list[float] = []
            while sum(seconds) < arguments.seconds:
                start = time.perf_counter()
                work.call()
                seconds.append(time.perf_counter() - start)
            turns[work.name].append(statistics.median(seconds))
    return {name: statistics.median(turn) for name, turn in turns.items()}


def row(
    work: Work, seconds: float, peaks: dict[str, float], table: str, threads: int
) -> dict[str, Any]:
    peak = peak_of(peaks, "int8" if "int8" in work.name else "float32", table, threads)
    read = peaks[f"read memory {threads}"]
    least = max(work.flops / peak if peak else 0.0, work.bytes / read) / 1e9
    return {
        "name": work.name,
        "times": work.times,
        "milliseconds": 1e3 * seconds,
        "gigaflops": work.flops / seconds / 1e9,
        "of_peak": work.flops / seconds / 1e9 / peak if peak else 0.0,
        "gigabytes": work.bytes / seconds / 1e9,
        "of_roof": least / seconds,
    }


def text(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'':<24}{'calls':>6}{'ms a call':>11}{'share':>8}{'GFLOP/s':>9}{'of peak':>9}"
             f"{'GB/s':>7}{'of roof':>9}"]  # fmt: skip
    for r in rows:
        share = f"{r['share']:.1%}" if "share" in r else ""
        rate = f"{r['gigaflops']:>9.0f}{r['of_peak']:>9.0%}" if r["gigaflops"] else " " * 18
        lines.append(f"{r['name']:<24}{r['times']:>6}{r['milliseconds']:>11.3f}{share:>8}{rate}"
                     f"{r['gigabytes']:>7.1f}{r['of_roof']:>9.0%}")  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    main()
