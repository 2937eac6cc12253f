"""From turns to ratios, a table, a file and a chart."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

OURS = "xlmr_ext"
# Least cosine between a library's output and transformers' that counts as the same function.
LEAST_COSINE = {"float32": 0.9999, "int8": 0.98}
# What two runs must share for their cases to stand in one table.
_KIND = ("machine", "threads", "isa", "shape", "what", "head")


def quartiles(values: Sequence[float]) -> list[float]:
    """[first quartile, median, third quartile]"""
    return [float(x) for x in np.percentile(values, [25, 50, 75])]


def ratios(
    medians: Mapping[str, Sequence[float]], precisions: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """By precision, the fastest other library's time over xlmr_ext's, round by round.

    Args:
        medians: seconds of each library's turns, one a round.
        precisions: of each library.
    """
    found = {}
    for precision in LEAST_COSINE:
        named = [name for name in medians if precisions[name] == precision]
        own = next((name for name in named if name.startswith(OURS)), None)
        others = {name: statistics.median(medians[name]) for name in named if name != own}
        if own is None or not others:
            continue
        fastest = min(others, key=others.__getitem__)
        pairs = [b / a for a, b in zip(medians[own], medians[fastest], strict=True)]
        found[precision] = {"fastest": fastest, "ratio": quartiles(pairs)}
    return found


def earlier(path: Path, results: Mapping[str, Any]) -> dict[str, Any]:
    """The cases of an earlier run in this file.

    Raises:
        ValueError: that run was of another kind.
    """
    if not path.exists():
        return {}
    before = json.loads(path.read_text())
    differs = [key for key in _KIND if before[key] != results[key]]
    if differs:
        raise ValueError(f"{path} is of another kind of run: its {', '.join(differs)} differ")
    return before["cases"]  # type: ignore[no-any-return]


def table(results: Mapping[str, Any]) -> str:
    """Milliseconds of each library and case, and the ratios, as text."""
    cases, libraries = results["cases"], results["libraries"]
    left = max(len(name) for name in libraries) + 3
    lines = [
        f"{results['what']}, {results['head']}, {results['threads']} threads, "
        f"instructions: {results['isa']['limit']}; {results['machine']['processor']}",
        "median milliseconds +- half the distance of the quartiles; ! others used the processor",
        " " * left + "".join(f"{case:>16}" for case in cases),
    ]
    for name, library in libraries.items():
        mark = "" if library["computes"] == results["head"] else " *"
        cells = (_cell(case["libraries"].get(name, {})) for case in cases.values())
        lines.append(f"{name + mark:<{left}}" + "".join(f"{cell:>16}" for cell in cells))
    for precision in LEAST_COSINE:
        if any(precision in case["ratios"] for case in cases.values()):
            found = [case["ratios"].get(precision) for case in cases.values()]
            ratio = [f"{f['ratio'][1]:.2f}" if f else "" for f in found]
            fastest = [f["fastest"].split()[0] if f else "" for f in found]
            lines.append(f"{'/ ' + precision:<{left}}" + "".join(f"{x:>16}" for x in ratio))
            lines.append(" " * left + "".join(f"{x:>16}" for x in fastest))
    if any(library["computes"] != results["head"] for library in libraries.values()):
        lines.append("* the encoder alone: it has no classifier")
    lines.append("/ the fastest other library's time over xlmr_ext's")
    for name, library in libraries.items():
        for way in library["ways"]:
            packages = ", ".join(f"{package} {v}" for package, v in way["versions"].items())
            lines.append(f"{name}: {packages}; {way['settings']}; {way['instruction_set']}")
    lines += [f"absent: {name}: {why}" for name, why in results["absent"].items()]
    return "\n".join(lines)


def _cell(found: Mapping[str, Any]) -> str:
    if "milliseconds" in found:
        low, median, high = found["milliseconds"]
        mark = "!" if found["disturbed"] > 0 else ""
        return f"{mark}{median:.1f} +- {(high - low) / 2:.1f}"
    if "cosine" in found:
        return f"differs ({found['cosine']:.3f})"
    return "failed" if found else "-"


def markdown(results: Mapping[str, Any]) -> str:
    """Medians and ratios as docs/performance.md shows them."""
    cases = results["cases"]
    rows = [["milliseconds", *cases], ["---", *["---:"] * len(cases)]]
    for name, library in results["libraries"].items():
        found = [case["libraries"].get(name, {}) for case in cases.values()]
        if any("milliseconds" in f for f in found):
            mark = "" if library["computes"] == results["head"] else " (encoder alone)"
            rows.append([name + mark, *(_rounded(f.get("milliseconds")) for f in found)])
    for precision in LEAST_COSINE:
        ratios = [case["ratios"].get(precision) for case in cases.values()]
        if any(ratios):
            cells = [f"**{r['ratio'][1]:.2f}** {r['fastest'].split()[0]}" if r else ""
                     for r in ratios]  # fmt: skip
            rows.append([f"fastest other / xlmr_ext, {precision}", *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _rounded(milliseconds: Sequence[float] | None) -> str:
    if milliseconds is None:
        return "-"
    median = milliseconds[1]
    return f"{median:.1f}" if median < 100 else f"{median:,.0f}"


def draw(results: Mapping[str, Any], path: Path) -> None:
    """A bar for each library and case, in milliseconds with quartiles; nothing without
    matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print("no chart: matplotlib is not installed", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    cases, libraries = results["cases"], list(results["libraries"])
    measured = [
        name for name in libraries
        if any("milliseconds" in case["libraries"].get(name, {}) for case in cases.values())
    ]  # fmt: skip
    figure, axes = pyplot.subplots(
        1, len(cases), figsize=(max(8.0, 2.2 * len(cases) + 1), 4.5), squeeze=False
    )
    colours = pyplot.get_cmap("tab10")
    for axis, (case, found) in zip(axes[0], cases.items(), strict=True):
        for place, name in enumerate(measured):
            if "milliseconds" not in found["libraries"].get(name, {}):
                continue
            low, median, high = found["libraries"][name]["milliseconds"]
            axis.bar(
                place, median, yerr=[[median - low], [high - median]], label=name,
                color=colours(place), hatch="//" if name.startswith(OURS) else None,
            )  # fmt: skip
        axis.set_title(case)
        axis.set_xticks([])
        axis.set_ylim(bottom=0)
    axes[0][0].set_ylabel("milliseconds, less is better")
    handles = [
        Patch(color=colours(place), label=name, hatch="//" if name.startswith(OURS) else None)
        for place, name in enumerate(measured)
    ]
    figure.legend(handles=handles, loc="lower center", ncols=4, frameon=False)
    figure.suptitle(
        f"{results['what']}, {results['threads']} threads, instructions: "
        f"{results['isa']['limit']}\n{results['machine']['processor']}",
        fontsize="medium",
    )
    figure.tight_layout(rect=(0, 0.13, 1, 1))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
