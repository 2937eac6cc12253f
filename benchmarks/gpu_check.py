"""Everything that a GPU can tell about xlmr_ext, in one command and less than 8 minutes.

    python benchmarks/gpu_check.py                          # from a checkout; writes gpu_check.json
    python benchmarks/gpu_check.py --no-build --skip tests  # of a package with kernels, installed
    python benchmarks/gpu_check.py --rehearse               # without a GPU: a tiny model on the CPU

It builds the package with CUDA kernels for this GPU into a temporary folder (needs nvcc, a C++
compiler and, where scikit-build-core, pybind11, cmake and ninja are not installed, the network);
runs every test that a GPU can run (needs pytest, hypothesis, transformers); measures time and
memory of whole models beside transformers', forward and training (forward and backward, dropout
on; an optimiser's step would be the same on both sides); and each op's share of what the device
was measured to do. Tables are printed, and one JSON file has all of it, with device, driver and
versions. A section that fails is reported there, the rest goes on, and the exit status is 1.

Of xlmr_ext three ways are measured: its kernels with its own products (native), with torch's
(torch; XLMR_EXT_CUDA_GEMM), and torch's operators alone (fallback). Medians with quartiles, over
CUDA events, all in turn. Random weights of XLM-R's base shape, 3 labels.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gpu import build, suite, tables
from gpu.process import measured
from peers.cases import DEFAULT, Shape, lengths_of
from peers.machine import machine

SECTIONS = ("tests", "speed", "kernels")
LARGER = ("64x128", "16x512", "ragged128")
OF_KERNELS = ("8x128", "16x512", "ragged")
PACKAGES = ("torch", "transformers", "flash_attn", "numpy", "pytest", "triton")


def main() -> None:
    arguments = parsed()
    # Before anything else: a sentence rather than a section that fails.
    import torch

    if not (arguments.rehearse or torch.cuda.is_available()):
        sys.exit("gpu_check.py: torch finds no GPU here; --rehearse runs the same on the CPU.")
    results: dict[str, Any] = {
        "rehearsal": arguments.rehearse,
        "device": device(arguments.rehearse),
        "machine": machine(),
        "versions": versions(),
        "settings": {key: str(value) for key, value in vars(arguments).items()},
        "shape": asdict(shape_of(arguments)),
        "sections": {},
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu_check-") as folder:
        check(arguments, Path(folder).resolve(), results)
    print("\n".join(tables.text(results)))
    print(f"\n{arguments.output} has all of it")
    sys.exit(any(section["status"] == "failed" for section in results["sections"].values()))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("gpu_check.json"), metavar="FILE",
                        help="the JSON to write; default gpu_check.json")  # fmt: skip
    parser.add_argument("--no-build", action="store_true",
                        help="check the package as it is installed, with its kernels")  # fmt: skip
    parser.add_argument("--skip", nargs="+", choices=SECTIONS, default=[], metavar="SECTION",
                        help=f"of {', '.join(SECTIONS)}")  # fmt: skip
    parser.add_argument("--quick", action="store_true",
                        help="two cases, fewer turns: a first look in half the time")  # fmt: skip
    parser.add_argument("--rehearse", action="store_true",
                        help="the same without a build, on the CPU with a tiny model: numbers "
                        "that mean nothing")  # fmt: skip
    parser.add_argument("--minutes", type=float, default=7.5,
                        help="for all; what finds no time is named; default 7.5")  # fmt: skip
    parser.add_argument("--cases", nargs="+", metavar="CASE",
                        help=f"of speed; default {' '.join((*DEFAULT, *LARGER))}")  # fmt: skip
    parser.add_argument("--kernel-cases", nargs="+", metavar="CASE",
                        help=f"default {' '.join(OF_KERNELS)}")  # fmt: skip
    parser.add_argument("--dtypes", nargs="+", metavar="DTYPE",
                        choices=("float64", "float32", "float16", "bfloat16"),
                        help="default float32 float16 bfloat16; rehearsed float32")  # fmt: skip
    for size in ("layers", "hidden", "heads", "inner", "vocabulary"):
        default = getattr(Shape, size)
        parser.add_argument(f"--{size}", type=int, help=f"default {default}")
    arguments = parser.parse_args()
    quick, rehearse = arguments.quick, arguments.rehearse
    if rehearse:
        arguments.cases = arguments.cases or ["2x8"]
        arguments.kernel_cases = arguments.kernel_cases or ["2x8"]
        arguments.dtypes = arguments.dtypes or ["float32"]
    else:
        some = ["8x128", "ragged"]
        arguments.cases = arguments.cases or (some if quick else [*DEFAULT, *LARGER])
        arguments.kernel_cases = arguments.kernel_cases or (some if quick else [*OF_KERNELS])
        arguments.dtypes = arguments.dtypes or ["float32", "float16", "bfloat16"]
    try:
        for case in (*arguments.cases, *arguments.kernel_cases):
            lengths_of(case)
    except ValueError as error:
        parser.error(str(error))
    return arguments


def shape_of(arguments: argparse.Namespace) -> Shape:
    sizes: dict[str, int] = {}
    if arguments.rehearse:
        sizes.update(layers=2, hidden=32, heads=2, inner=48, vocabulary=50)
    for name in ("layers", "hidden", "heads", "inner", "vocabulary"):
        value = getattr(arguments, name)
        if value is not None:
            sizes[name] = value
    return Shape(**sizes)


def check(arguments: argparse.Namespace, folder: Path, results: dict[str, Any]) -> None:
    """All sections, into the results. Each has a share of the time that is left."""
    until = time.monotonic() + 60 * arguments.minutes
    sections = results["sections"]
    site: Path | None = None

    def left(share: float) -> float:
        rest: float = until - time.monotonic()
        return max(share * rest, 0.0)

    def section(name: str, work: Callable[[], dict[str, Any]]) -> None:
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            found = work()
        except Exception as error:
            found = {"status": "failed", "error": str(error)}
        sections[name] = {"status": "failed" if failed(found) else "passed", **found}
        text = json.dumps(results, indent=1) + "\n"
        arguments.output.write_text(text, encoding="utf-8")

    if not (arguments.rehearse or arguments.no_build):
        capability = results["device"]["capability"]
        made = folder / "site"
        section("build", lambda: build.build(made, folder, capability, left(0.6)))
        if sections["build"]["status"] == "passed":
            site = made
    environment = suite.environment(site)
    section("package", lambda: package(environment, folder, site, arguments.rehearse))

    if "tests" not in arguments.skip:
        # A rehearsal shows that tests are run and counted, by some that need no GPU.
        files, keyword = [*suite.FILES], suite.ON_GPU
        if arguments.rehearse:
            files, keyword = ["test_cuda_kernels"], "what_runs_on_what"
        section("tests", lambda: suite.run_tests(files, keyword, folder, environment, left(0.5)))

    shares = {"speed": 0.75, "kernels": 1.0} if "kernels" not in arguments.skip else {"speed": 1.0}
    for name, share in shares.items():
        if name not in arguments.skip:
            section(name, lambda n=name, s=share: by_dtype(  # type: ignore[misc]
                n, arguments, folder, environment, left(s)))  # fmt: skip


def by_dtype(
    name: str, arguments: argparse.Namespace, folder: Path, environment: dict[str, str],
    seconds: float,
) -> dict[str, Any]:  # fmt: skip
    """A section's processes, one a dtype."""
    from gpu.speed import LIBRARIES
    from gpu.ways import WAYS

    quick, tiny = arguments.quick, arguments.rehearse
    plan = {
        "section": f"gpu.{name}",
        "device": "cpu" if tiny else "cuda",
        "shape": asdict(shape_of(arguments)),
        "cases": arguments.cases if name == "speed" else arguments.kernel_cases,
        "ways": list(LIBRARIES if name == "speed" else WAYS),
        "rounds": 2 if tiny else 5 if quick else 9,
        "turn": 0.001 if tiny else 0.01 if quick else 0.03,
    }
    found = {}
    until = time.monotonic() + seconds
    for number, dtype in enumerate(arguments.dtypes):
        # To start takes a process some seconds, which are not there for measuring.
        share = (until - time.monotonic()) / (len(arguments.dtypes) - number) - 8
        found[dtype] = measured({**plan, "dtype": dtype}, folder, environment, max(share, 1.0))
    return {"dtypes": found}


def failed(found: Any) -> bool:
    """Whether anything in the findings failed or died."""
    if isinstance(found, dict):
        if found.get("status") == "failed" or found.get("failed") or found.get("died"):
            return True
        return any(failed(value) for value in found.values())
    return False


def device(rehearse: bool) -> dict[str, Any]:
    """The GPU that torch calls cuda:0, by torch and by nvidia-smi."""
    import torch

    if rehearse:
        return {"name": "none: a rehearsal on the CPU"}
    properties = torch.cuda.get_device_properties(0)
    found = {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "count": torch.cuda.device_count(),
        "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
    }
    fields = ("name", "driver_version", "clocks.max.sm", "power.limit", "temperature.gpu")
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True)
        rows = [line.split(", ") for line in done.stdout.splitlines()]
        found["nvidia_smi"] = [dict(zip(fields, row, strict=False)) for row in rows]
        if rows and len(rows[0]) > 1:
            found["driver"] = rows[0][1]
    return found


def versions() -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    found["float32_products"] = torch.get_float32_matmul_precision()
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def package(
    environment: dict[str, str], folder: Path, site: Path | None, rehearse: bool
) -> dict[str, Any]:
    """What the package that is checked says of itself.

    Raises:
        RuntimeError: it cannot be imported, is not that in ``site``, or has no kernels for this
            GPU.
    """
    program = "import json, xlmr_ext; print(json.dumps([xlmr_ext.__file__, xlmr_ext.build_info()]))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                          env=environment, cwd=folder)  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    file, info = json.loads(done.stdout)
    if site is not None and site not in Path(file).parents:
        raise RuntimeError(f"{file} is imported instead of what was built; uninstall it")
    if not rehearse:
        kernels = info["cuda_kernels"]
        runs = kernels.get("cuda:0", kernels.get("devices", "this build has no CUDA kernels"))
        if runs != "runs the CUDA kernels":
            raise RuntimeError(f"{file}: {runs}; what follows is of torch's operators alone")
    return {"file": file, "version": info.get("version"), "build_info": info}


if __name__ == "__main__":
    main()
