"""``xlmr-ext info``."""

from __future__ import annotations

import argparse
import json

from xlmr_ext.cli.console import threads, use_threads

NAME = "info"
SUMMARY = "describe this build and machine"
DESCRIPTION = """\
Say what this build is and how it would run here: version, compiler, kernel tables, the one chosen
and why, what --dtype auto is, threads, torch, CUDA. XLMR_EXT_ISA chooses a table."""

EXAMPLES = """\
examples:
  xlmr-ext info
  xlmr-ext info --json
  XLMR_EXT_ISA=baseline xlmr-ext info"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="as one JSON object")


def run(arguments: argparse.Namespace) -> int:
    count = use_threads(arguments)
    from xlmr_ext import build_info
    from xlmr_ext.frozen import auto_dtype

    info = dict(build_info())
    has = "has" if info["bf16_units"] else "has no"
    info["dtype_auto"] = f"{auto_dtype()}: the table {has} products in bfloat16"
    info["threads"] = count
    info["threads_by"] = threads(arguments)[1]
    if arguments.json:
        print(json.dumps(info, indent=2, default=str))
        return 0
    inner = [f"  {name}" for value in info.values() if isinstance(value, dict) for name in value]
    width = max(map(len, [*info, *inner]))
    for key, value in info.items():
        for name, part in value.items() if isinstance(value, dict) else [(None, value)]:
            shown = ", ".join(map(str, part)) if isinstance(part, list | tuple) else str(part)
            label = key if name is None else f"  {name}"
            print(f"{label:<{width}}  {shown}")
    return 0
