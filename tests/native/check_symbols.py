"""Fails where an object file of one instruction set could lend code to another.

    python tests/native/check_symbols.py build/native

The linker keeps one copy of a symbol that several objects define weakly. If that symbol is code,
the copy may hold instructions that the processor lacks. So every symbol that an object of
``xlmr_<isa>`` shares with others must lie in ``xlmr::<isa>::``, nothing may run before main, and
the objects compiled for every processor must not use its wide registers.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

LOCAL = set("abdnrtN")  # nm's letters of symbols that no other object sees
UNDEFINED = set("Uvw")
# xmm is x86-64's baseline; ymm and zmm are not.
WIDE_REGISTER = re.compile(r"%[yz]mm\d")
EVERYWHERE = ("baseline", "core")


def output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def leaks(obj: Path, isa: str) -> list[str]:
    """The symbols that `obj` shares with other objects and should not."""
    found = []
    for line in output("nm", "--demangle", str(obj)).splitlines():
        kind, name = line[17:18], line[19:]
        if kind in LOCAL or kind in UNDEFINED:
            continue
        if not name.startswith(f"xlmr::{isa}::"):
            found.append(f"{obj.name} ({isa}): {kind} {name}")
    sections = output("readelf", "--sections", "--wide", str(obj))
    found += [
        f"{obj.name} ({isa}): section {section}: code that runs before main"
        for section in (".init_array", ".ctors")
        if section in sections
    ]
    return found


def wide_code(obj: Path, isa: str) -> list[str]:
    """The first instruction of `obj` that not every x86-64 processor has, if it is for those."""
    if "X86-64" not in output("readelf", "--file-header", str(obj)):
        return []
    for line in output("objdump", "--disassemble", "--no-show-raw-insn", str(obj)).splitlines():
        if WIDE_REGISTER.search(line):
            return [f"{obj.name} ({isa}): {line.strip()}"]
    return []


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    objects: dict[str, list[Path]] = {}
    for obj in sorted(Path(sys.argv[1]).glob("CMakeFiles/xlmr_*.dir/**/*.o")):
        target = next(part for part in obj.parts if re.fullmatch(r"xlmr_\w+\.dir", part))
        objects.setdefault(target[len("xlmr_") : -len(".dir")], []).append(obj)
    if "baseline" not in objects:
        print(f"no objects of the kernels under {sys.argv[1]}", file=sys.stderr)
        return 2
    found = []
    for isa, files in objects.items():
        for obj in files:
            if isa != "core":
                found += leaks(obj, isa)
            if isa in EVERYWHERE:
                found += wide_code(obj, isa)
    print(*found, sep="\n", end="\n" if found else "")
    counts = ", ".join(f"{len(files)} of {isa}" for isa, files in objects.items())
    print(f"symbols of {counts}: {len(found)} leaks")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
