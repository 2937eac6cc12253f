"""What every command needs: messages on stderr, threads, and where a model comes from."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING, Any

from xlmr_ext.cli.arguments import PROGRAM
from xlmr_ext.threads import available_cpus, cpu_quota

if TYPE_CHECKING:
    from xlmr_ext.data import Format
    from xlmr_ext.pretrained import PreTrainedModel


def say(text: str) -> None:
    """One line on stderr."""
    # What cannot be encoded is escaped, so that a message never fails for its content.
    encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
    shown = text.encode(encoding, "backslashreplace").decode(encoding)
    print(f"{PROGRAM}: {shown}", file=sys.stderr, flush=True)


def threads(arguments: argparse.Namespace) -> tuple[int, str]:
    """The number of threads, and what decided it."""
    if arguments.threads is not None:
        return arguments.threads, "--threads"
    wish = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if wish.isdigit() and int(wish) > 0:
        return int(wish), "OMP_NUM_THREADS"
    quota = cpu_quota()
    return available_cpus(), "affinity" if quota is None else f"affinity and a quota of {quota:g}"


def use_threads(arguments: argparse.Namespace) -> int:
    """Gives torch the number of threads, and returns it."""
    import torch

    import xlmr_ext._launch  # noqa: F401  # first, to know torch's own number from this one

    count, _ = threads(arguments)
    torch.set_num_threads(count)
    return count


def check_device(arguments: argparse.Namespace) -> None:
    """ValueError where torch lacks the device; bad usage where --dtype does not go with it."""
    if arguments.device == "cpu":
        return
    dtype = getattr(arguments, "dtype", None)
    if dtype in ("bfloat16", "int8"):
        arguments.parser.error(
            f"--dtype {dtype} is for the CPU, and --device is {arguments.device}"
        )
    import torch

    from xlmr_ext.loading import require_device

    require_device("--device", torch.device(arguments.device))


def to_run(model: PreTrainedModel, arguments: argparse.Namespace) -> None:
    """Makes a model ready for inference: packed on the CPU, as it is on another device."""
    if arguments.device == "cpu":
        model.optimize_for_inference(arguments.dtype)
    elif model.is_frozen:
        raise ValueError(
            f"{arguments.model} is a frozen model, which runs on the CPU: give the checkpoint that "
            "it was made from"
        )
    else:
        model.to(arguments.device)


def hub(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `add_hub`, as from_pretrained takes them."""
    return {
        "revision": arguments.revision,
        "cache_dir": arguments.cache_dir,
        "local_files_only": arguments.local_files_only,
    }


def input_format(arguments: argparse.Namespace, path: str) -> Format:
    """The format of an input; bad usage (exit code 2) where it cannot serve."""
    from xlmr_ext.data import guess_format

    chosen: Format
    if arguments.input_format is not None:
        chosen = arguments.input_format
    elif path == "-":
        chosen = "txt"
    else:
        try:
            chosen = guess_format(path)
        except ValueError as error:
            arguments.parser.error(f"{error} with --input-format")
    if chosen == "txt" and (arguments.label_column or arguments.pair_column):
        arguments.parser.error(
            f"{'standard input' if path == '-' else path} is plain text, which has no columns: "
            "labels and pairs need csv, tsv or jsonl (--input-format)"
        )
    return chosen
