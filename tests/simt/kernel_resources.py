"""Registers, spills and static shared memory of every CUDA kernel, from what ptxas said.

    cmake ... -DXLMR_EXT_CUDA=ON -DCMAKE_CUDA_FLAGS=-Xptxas=-v && ninja ... | tee build.log
    python tests/simt/kernel_resources.py build.log

Fails where a kernel spills that is not of float64 alone, or where the log has no kernel. Dynamic
shared memory is the launch's: its sizes are asserted in the sources.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(sm_\w+)'")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


@dataclass
class Kernel:
    name: str
    architecture: str
    registers: int = 0
    spilled: int = 0  # bytes stored and loaded
    shared: int = 0

    def may_spill(self) -> bool:
        return "<double" in self.name


def read(log: str) -> list[Kernel]:
    """The kernels of a log, in its order; lines of others may stand between, not within."""
    found: list[Kernel] = []
    for line in log.splitlines():
        if match := ENTRY.search(line):
            found.append(Kernel(match[1], match[2]))
        elif (match := SPILLS.search(line)) and found:
            found[-1].spilled = int(match[2]) + int(match[3])
        elif (match := USED.search(line)) and found:
            found[-1].registers, found[-1].shared = int(match[1]), int(match[2] or 0)
    names = [kernel.name for kernel in found]
    filtered = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    )
    for kernel, name in zip(found, filtered.stdout.splitlines(), strict=True):
        kernel.name = shortened(name)
    return found


def shortened(name: str) -> str:
    """Without namespaces, the result's type and the arguments."""
    name = re.sub(r"\(anonymous namespace\)::|\w+::|^void ", "", name)
    name = re.sub(r"\(Layout\)(\d)", r"\1", name)
    depth = 0
    for place, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return name[:place]
    return name


def table(kernels: list[Kernel]) -> str:
    architectures = sorted({k.architecture for k in kernels}, key=lambda a: int(a[3:].rstrip("af")))
    by_name: dict[str, dict[str, Kernel]] = {}
    for kernel in kernels:
        by_name.setdefault(kernel.name, {})[kernel.architecture] = kernel
    width = max(map(len, by_name))
    lines = [
        f"{'registers, spilled bytes':<{width}}  " + "".join(f"{a:>12}" for a in architectures)
    ]
    for name, of in sorted(by_name.items()):
        cells = [
            f"{of[a].registers}{f' +{of[a].spilled}' if of[a].spilled else ''}" if a in of else "-"
            for a in architectures
        ]
        lines.append(f"{name:<{width}}  " + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("log", type=Path, help="what the build printed")
    kernels = read(parser.parse_args().log.read_text(encoding="utf-8"))
    if not kernels:
        print("no kernel in the log: was it built with -Xptxas=-v?", file=sys.stderr)
        return 1
    print(table(kernels))
    faults = [
        f"{k.name} for {k.architecture} spills {k.spilled} bytes"
        for k in kernels
        if k.spilled and not k.may_spill()
    ]
    # The emulator has none, so nothing would watch over it.
    faults += [
        f"{k.name} for {k.architecture} has {k.shared} bytes of static shared memory"
        for k in kernels
        if k.shared
    ]
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
