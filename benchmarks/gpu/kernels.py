"""Each op by itself, as a share of what the device was measured to do at most.

The peaks are measured, not the data sheet's: of arithmetic a large product by torch in the same
type, of memory a large copy. The ops and their least work are those of roofline.py.
"""

from __future__ import annotations

import time
from typing import Any

import roofline
import torch
from peers.cases import Shape, lengths_of
from peers.report import quartiles

from gpu.clock import Clock, Timed, in_turn
from gpu.process import Progress
from gpu.ways import FALLBACK, TORCH, computed_by, refusal

# The ops that XLMR_EXT_CUDA_GEMM is about; the others are the same under both of its values.
_PRODUCTS = ("query, key, value", "attention's output", "feed-forward")


def run(plan: dict[str, Any], clock: Clock, progress: Progress) -> None:
    """A plan: dtype, shape, cases, ways (``WAYS``), rounds, seconds, turn: least seconds."""
    dtype, shape = getattr(torch, plan["dtype"]), Shape(**plan["shape"])
    found = progress.found
    found.update(absent={}, failed={}, cases={}, left_out=[])
    torch.manual_seed(0)
    found["peaks"] = peaks_of(dtype, clock)
    progress.write()
    until = time.monotonic() + plan["seconds"]
    for number, case in enumerate(plan["cases"]):
        now = time.monotonic()
        if number and now > until:
            found["left_out"].append(case)
            continue
        calls, works = {}, {}
        for way in plan["ways"]:
            why = None if way == FALLBACK else refusal(clock.device, dtype)
            if why is not None:
                found["absent"][way] = why
                continue
            progress.running(way, case)
            try:
                with computed_by(way):
                    made = works_of(shape, case, dtype, clock)
                    for work in made:
                        if way != TORCH or work.name.removesuffix("'") in _PRODUCTS:
                            work.call()
                            works[way, work.name] = work
                    clock.check()
            except Exception as error:
                found["failed"][f"{way}, {case}"] = f"{type(error).__name__}: {error}"
                works = {key: work for key, work in works.items() if key[0] != way}
                clock.check()
        within = progress.within(case)
        for (way, name), work in works.items():
            calls[f"{way}: {name}"] = Timed(work.call, way, within)
        share = now + (until - now) / (len(plan["cases"]) - number)
        turns = in_turn(calls, clock, plan["rounds"], plan["turn"], share, ahead=True)
        found["cases"][case] = {
            "tokens": sum(lengths_of(case)),
            "ops": [
                row(way, work, turns[f"{way}: {name}"], found["peaks"])
                for (way, name), work in works.items()
            ],
        }
        progress.write()


def works_of(shape: Shape, case: str, dtype: torch.dtype, clock: Clock) -> list[roofline.Work]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(clock.device):
            return roofline.works(shape, lengths_of(case), backward=True)
    finally:
        torch.set_default_dtype(before)


def peaks_of(dtype: torch.dtype, clock: Clock) -> dict[str, float]:
    """Operations and bytes a second: the best of five turns."""
    on_gpu = clock.device != "cpu"
    side, size = (8192, 2**30) if on_gpu else (64, 2**16)
    a, b = (torch.randn(side, side, device=clock.device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(a)
    source = torch.zeros(size // 4, device=clock.device, dtype=torch.float32)
    copy = torch.empty_like(source)

    def best(call: Any) -> float:
        call()
        return min(clock.seconds(call, 3) for _ in range(5))

    with torch.no_grad():
        return {
            "flops": 2 * side**3 / best(lambda: torch.mm(a, b, out=product)),
            "bytes": 2 * size / best(lambda: copy.copy_(source)),
        }


def row(
    way: str, work: roofline.Work, taken: list[float], peaks: dict[str, float]
) -> dict[str, Any]:
    first, median, third = quartiles(taken)
    least = max(work.flops / peaks["flops"], work.bytes / peaks["bytes"])
    return {
        "op": work.name,
        "way": way,
        "times": work.times,
        "microseconds": [1e6 * first, 1e6 * median, 1e6 * third],
        "flops": work.flops / median,
        "of_peak": work.flops / median / peaks["flops"],
        "bytes": work.bytes / median,
        "of_bandwidth": work.bytes / median / peaks["bytes"],
        "of_roof": least / median,
    }
