"""Start-up and memory against transformers: seconds and MiB of fresh processes, in turn.

    python benchmarks/startup.py --cache /tmp/startup         # random weights of base shape, 1.1 GB
    python benchmarks/startup.py --model FOLDER --json out.json
    python benchmarks/startup.py --positions 8194 --batch 2x8192 --sides frozen   # one long batch

Each side is a process of its own that imports, loads the folder and runs one batch. The seconds
are those of the steps, in `all` from the start of the process to the first result, and in `beyond`
the same less what a process takes that imports torch alone. `peak` is the largest resident memory
(VmHWM, mapped files included), beyond that process's as well. A first round, which does not count,
leaves the files in the disk cache.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

STEPS = ("import", "load", "first", "all")
# What each side loads: a key of the folders.
SIDES = {
    "torch": "plain",
    "transformers": "plain",
    "xlmr_ext": "plain",
    "optimized": "plain",
    "optimized int8": "plain",
    "frozen": "float32",
    "frozen int8": "int8",
}
EXPLAINED = """\
torch           imports torch, and nothing else
xlmr_ext        from_pretrained(FOLDER)
optimized       from_pretrained(FOLDER).optimize_for_inference()
optimized int8  from_pretrained(FOLDER).optimize_for_inference("int8")
frozen          from_pretrained(a folder of save_frozen(), float32)
frozen int8     from_pretrained(a folder of save_frozen(), int8)"""


def model_class(package: Any, folder: Path) -> Any:
    """The class that the folder's configuration names."""
    config = json.loads((folder / "config.json").read_text())
    return getattr(package, (config.get("architectures") or ["XLMRobertaModel"])[0])


def loader(side: str, folder: Path) -> Callable[[], Any]:
    """Imports what the side needs; -> what loads its model."""
    import torch

    if side == "torch":
        return lambda: None
    if side == "transformers":
        import transformers

        theirs = model_class(transformers, folder)
        return lambda: theirs.from_pretrained(folder, dtype=torch.float32)
    import xlmr_ext

    ours = model_class(xlmr_ext, folder)
    if not side.startswith("optimized"):
        return lambda: ours.from_pretrained(folder)
    dtype = "int8" if side.endswith("int8") else "float32"
    return lambda: ours.from_pretrained(folder).optimize_for_inference(dtype)


def run_side(side: str, folder: Path, batch: str, threads: int, started: float) -> None:
    """What a process of its own does: prints seconds, memory and the first numbers it computed."""
    moments = [started]
    load = loader(side, folder)
    moments.append(time.monotonic())
    model = load()
    moments.append(time.monotonic())
    result: list[float] = []
    if model is not None:
        import torch

        torch.set_num_threads(threads)
        rows, length = (int(number) for number in batch.split("x"))
        # As often as a text has its words (Zipf's law): tables are read by row. Not by torch's
        # generator: seeding it imports some 20 MiB.
        numbers, most = random.Random(0), math.log(model.config.vocab_size - 10)
        ids = [4 + int(math.exp(numbers.random() * most)) for _ in range(rows * length)]
        with torch.inference_mode():
            result = model(torch.tensor(ids).reshape(rows, length))[0].flatten()[:4].tolist()
    moments.append(time.monotonic())
    status = Path("/proc/self/status").read_text()
    seconds = [after - before for before, after in pairwise(moments)]
    print(
        json.dumps(
            {
                **dict(zip(STEPS, [*seconds, moments[-1] - started], strict=True)),
                "peak": int(status.split("VmHWM:")[1].split()[0]) / 1024,
                "result": result,
            }
        )
    )


def write_folder(kind: str, source: Path, folder: Path, positions: int) -> None:
    """A random model of base shape, or the frozen form of ``source``."""
    import xlmr_ext

    if kind == "plain":
        config = xlmr_ext.XLMRobertaConfig(num_labels=3, max_position_embeddings=positions)
        xlmr_ext.XLMRobertaForSequenceClassification(config).save_pretrained(folder)
        return
    model = model_class(xlmr_ext, source).from_pretrained(source)
    model.optimize_for_inference(kind).save_frozen(folder)


def in_a_process(task: str, *arguments: object) -> str:
    """Runs this script again for one task; its standard output."""
    command = [sys.executable, __file__, task, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}:\n{done.stderr}")
    return done.stdout


def measure(
    folders: dict[str, Path], sides: list[str], batch: str, threads: int, repeats: int
) -> dict[str, list[dict[str, Any]]]:
    """What each process said, the sides in turn."""
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for number in range(repeats + 1):
        for side in sides:
            folder = folders[SIDES[side]]
            out = in_a_process("--side", side, folder, batch, threads, time.monotonic())
            if number:
                runs[side].append(json.loads(out))
    return runs


def report(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Prints the table; -> medians and quartiles of each side."""
    bare = {name: statistics.median(run[name] for run in runs["torch"]) for name in ("all", "peak")}
    found: dict[str, Any] = {}
    for side, rows in runs.items():
        columns = {step: [row[step] for row in rows] for step in STEPS}
        columns["load+first"] = [row["load"] + row["first"] for row in rows]
        columns["beyond"] = [row["all"] - bare["all"] for row in rows]
        columns["peak"] = [row["peak"] - bare["peak"] for row in rows]
        found[side] = {"result": rows[0]["result"]}
        for name, values in columns.items():
            low, middle, high = statistics.quantiles([*values, *values], n=4)
            found[side][name] = {"median": middle, "quartiles": [low, high]}
    print(f"{'':<15}" + "".join(f"{name:>12}" for name in columns) + "   of transformers'")
    for side, row in found.items():
        line = "".join(f"{row[name]['median']:>11.2f}s" for name in columns if name != "peak")
        line += f"{row['peak']['median']:>8.0f} MiB"
        if side != "torch" and "transformers" in found:
            shares = {
                name: row[name]["median"] / found["transformers"][name]["median"]
                for name in ("load+first", "beyond", "peak")
            }
            line += "   " + ", ".join(f"{name} {share:.2f}" for name, share in shares.items())
        print(f"{side:<15}{line}")
    return {"torch": bare, "sides": found}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"sides:\n{EXPLAINED}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, help="a folder of config.json and weights")
    parser.add_argument("--cache", type=Path, help="where random and frozen models are kept")
    parser.add_argument("--sides", nargs="+", choices=[*SIDES][1:], default=[*SIDES][1:])
    parser.add_argument("--batch", default="1x32", help="texts x tokens (default: 1x32)")
    parser.add_argument("--positions", type=int, default=514, help="of the random model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write all numbers here")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        cache = arguments.cache or Path(scratch)
        cache.mkdir(parents=True, exist_ok=True)
        plain = arguments.model or cache / f"plain-{arguments.positions}"
        if not (plain / "config.json").exists():
            in_a_process("--write", "plain", plain, plain, arguments.positions)
        folders = {"plain": plain}
        for kind in {SIDES[side] for side in arguments.sides} - {"plain"}:
            folders[kind] = cache / kind
            in_a_process("--write", kind, plain, folders[kind], arguments.positions)
        runs = measure(
            folders,
            ["torch", *arguments.sides],
            arguments.batch,
            arguments.threads,
            arguments.repeats,
        )
    found = report(runs)
    if arguments.json:
        settings = {name: str(value) for name, value in vars(arguments).items()}
        text = json.dumps({"settings": settings, "cpus": os.cpu_count(), **found}, indent=1)
        arguments.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--side"]:
        side, folder, batch, threads, started = sys.argv[2:]
        run_side(side, Path(folder), batch, int(threads), float(started))
    elif sys.argv[1:2] == ["--write"]:
        kind, source, folder, positions = sys.argv[2:]
        write_folder(kind, Path(source), Path(folder), int(positions))
    else:
        main()
