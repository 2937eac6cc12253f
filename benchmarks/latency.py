"""Single requests from 1, 2 and 4 caller threads: p50, p99 and requests per second.

    python benchmarks/latency.py                            # base shape, random weights
    python benchmarks/latency.py 1x16 ragged --callers 1 8 --json latency.json
    python benchmarks/latency.py --model DIR                # a classifier's own weights

Every caller is a Python thread that calls one shared model again and again, each call timed from
outside. xlmr_ext (its encoder frozen, as `predict` runs it) and transformers take turns in one
process; the rounds of a side are taken together. Ratios are transformers' number over ours, for
the rate ours over theirs, so that above 1 is always ours to win. The last columns are for xlmr_ext:
p99 over p50, and the rate over that of one caller.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peers.cases import batch_of, lengths_of
from peers.machine import machine


def one_round(call: Callable[[], Any], callers: int, seconds: float) -> tuple[list[float], float]:
    """Every caller calls until the time is up: seconds of each call, and calls per second."""
    together = threading.Barrier(callers + 1)
    times: list[list[float]] = [[] for _ in range(callers)]

    def work(mine: list[float]) -> None:
        call()  # this thread's workspace and team
        together.wait()
        stop = time.perf_counter() + seconds
        while (start := time.perf_counter()) < stop:
            call()
            mine.append(time.perf_counter() - start)

    threads = [threading.Thread(target=work, args=(mine,)) for mine in times]
    for thread in threads:
        thread.start()
    together.wait()
    began = time.perf_counter()
    for thread in threads:
        thread.join()
    done = [second for mine in times for second in mine]
    return done, len(done) / (time.perf_counter() - began)


def measure(
    sides: dict[str, Callable[[], Any]], callers: int, seconds: float, rounds: int
) -> dict[str, dict[str, float]]:
    times: dict[str, list[float]] = {name: [] for name in sides}
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, call in sides.items():
            done, rate = one_round(call, callers, seconds)
            times[name] += done
            rates[name].append(rate)
    found = {}
    for name in sides:
        cuts = statistics.quantiles(times[name], n=100, method="inclusive")
        found[name] = {
            "requests": len(times[name]),
            "p50_ms": 1e3 * cuts[49],
            "p99_ms": 1e3 * cuts[98],
            "per_second": statistics.median(rates[name]),
        }
    return found


def models(name: str | None) -> dict[str, Any]:
    """The same weights on both sides; of the base shape and random without a name."""
    import torch
    import transformers

    import xlmr_ext

    if name is not None:
        theirs = transformers.AutoModelForSequenceClassification.from_pretrained(name)
        ours = xlmr_ext.XLMRobertaForSequenceClassification.from_pretrained(name)
    else:
        torch.manual_seed(0)
        theirs = transformers.XLMRobertaForSequenceClassification(
            transformers.XLMRobertaConfig(
                vocab_size=250002, max_position_embeddings=514, type_vocab_size=1, num_labels=3,
                layer_norm_eps=1e-5, attn_implementation="sdpa",
            )
        )  # fmt: skip
        ours = xlmr_ext.XLMRobertaForSequenceClassification(xlmr_ext.XLMRobertaConfig(num_labels=3))
        ours.load_state_dict(theirs.state_dict())
    return {"xlmr_ext": ours.eval().optimize_for_inference(), "transformers": theirs.eval()}


def request(model: Any, case: str) -> Callable[[], Any]:
    import torch

    batch = batch_of(case, min(model.config.vocab_size, 250001))
    ids, mask = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.attention_mask)

    def call() -> Any:
        with torch.inference_mode():
            return model(input_ids=ids, attention_mask=mask)

    return call


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", default=["1x16", "1x128"], help="e.g. 1x512 ragged")
    parser.add_argument("--callers", nargs="+", type=int, default=[1, 2, 4], metavar="N")
    parser.add_argument("--seconds", type=float, default=3.0, help="of one round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="default: torch's own number, left as it is")
    parser.add_argument("--model", help="a classifier's folder or name, instead of random weights")
    parser.add_argument("--only", choices=("xlmr_ext", "transformers"), help="one side alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here too")
    arguments = parser.parse_args()
    try:
        list(map(lengths_of, arguments.cases))
    except ValueError as error:
        parser.error(str(error))

    import torch
    import transformers

    import xlmr_ext

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    sides = models(arguments.model)
    if arguments.only:
        sides = {arguments.only: sides[arguments.only]}
    info = xlmr_ext.build_info()
    about = {
        **machine(),
        "threads": torch.get_num_threads(),
        "xlmr_ext": {name: info[name] for name in ("version", "table", "threads")},
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "model": arguments.model or "base shape, random weights",
    }
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    columns = "".join(f"{f'{name}: p50':>18}{'p99':>9}{'per s':>8}" for name in sides)
    ratios = f"{'ratios: p50':>13}{'p99':>6}{'rate':>6}" if len(sides) == 2 else ""
    print(f"{'case':>8}{'callers':>8}{columns}{ratios}{'p99/p50':>9}{'rate/1':>8}")

    results = []
    for case in arguments.cases:
        calls = {name: request(model, case) for name, model in sides.items()}
        alone: dict[str, float] = {}
        for callers in arguments.callers:
            found = measure(calls, callers, arguments.seconds, arguments.rounds)
            results.append({"case": case, "callers": callers, **found})
            line = f"{case:>8}{callers:>8}"
            for side in found.values():
                line += (
                    f"{side['p50_ms']:>15.2f} ms{side['p99_ms']:>9.2f}{side['per_second']:>8.1f}"
                )
            if len(found) == 2:
                ours, theirs = found["xlmr_ext"], found["transformers"]
                line += f"{theirs['p50_ms'] / ours['p50_ms']:>13.2f}"
                line += f"{theirs['p99_ms'] / ours['p99_ms']:>6.2f}"
                line += f"{ours['per_second'] / theirs['per_second']:>6.2f}"
            first = next(iter(found.values()))
            alone = alone or first
            line += f"{first['p99_ms'] / first['p50_ms']:>9.2f}"
            line += f"{first['per_second'] / alone['per_second']:>8.2f}"
            print(line, flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({**about, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
