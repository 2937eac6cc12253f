"""The findings as text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def text(results: dict[str, Any]) -> Iterator[str]:
    device = results["device"]
    yield (
        f"{device['name']}, compute capability {device.get('capability', 'none')}, "
        f"driver {device.get('driver', 'none')}, torch {results['versions']['torch']}"
    )
    for name, section in results["sections"].items():
        yield ""
        yield f"{name}: {section['status']}"
        if "error" in section:
            yield f"  {section['error']}"
        if name == "tests" and "passed" in section:
            yield (f"  {section['passed']} passed, {section['failed']} failed, "
                   f"{section['skipped']} skipped in {section['seconds']:.0f} s")  # fmt: skip
            yield from (f"  failed: {failure['test']}" for failure in section["failures"])
        for dtype, found in section.get("dtypes", {}).items():
            yield ""
            yield from (speed if name == "speed" else kernels)(dtype, found)


def speed(dtype: str, found: dict[str, Any]) -> Iterator[str]:
    yield (
        f"{dtype}: milliseconds (quartiles), MB at the peak beyond the weights, times as fast as "
        f"transformers sdpa"
    )
    for case, kinds in found.get("cases", {}).items():
        for kind in (kind for kind in kinds if kind != "tokens"):
            yield f"  {case}, {kinds['tokens']} tokens, {kind}"
            for library, result in kinds[kind].items():
                yield f"    {library:<31}{_speed(result)}"
    yield from _rest(found)


def _speed(result: dict[str, Any]) -> str:
    if "milliseconds" not in result:
        return str(result.get("failed") or result.get("absent") or "not measured")
    first, median, third = result["milliseconds"]
    memory, faster = result["megabytes"], result.get("faster")
    return (
        f"{median:>10.3f} ({first:.3f} to {third:.3f})"
        + ("" if memory is None else f"{memory:>10.0f} MB")
        + ("" if faster is None else f"{faster[1]:>8.2f}")
    )


def kernels(dtype: str, found: dict[str, Any]) -> Iterator[str]:
    peaks = found.get("peaks")
    if peaks:
        yield (
            f"{dtype}: measured peaks {peaks['flops'] / 1e12:.3g} TFLOP/s (a large product by "
            f"torch), {peaks['bytes'] / 1e9:.4g} GB/s (a large copy)"
        )
    for case, result in found.get("cases", {}).items():
        yield f"  {case}, {result['tokens']} tokens"
        yield (f"    {'':<24}{'by':<10}{'us a call':>11}{'TFLOP/s':>9}{'of peak':>9}{'GB/s':>8}"
               f"{'of peak':>9}{'of roof':>9}")  # fmt: skip
        for op in result["ops"]:
            yield (
                f"    {op['op']:<24}{op['way']:<10}{op['microseconds'][1]:>11.1f}"
                f"{op['flops'] / 1e12:>9.2f}{op['of_peak']:>9.0%}{op['bytes'] / 1e9:>8.1f}"
                f"{op['of_bandwidth']:>9.0%}{op['of_roof']:>9.0%}"
            )
    yield from _rest(found)


def _rest(found: dict[str, Any]) -> Iterator[str]:
    for title in ("absent", "failed", "died"):
        yield from (f"  {title}: {name}: {why}" for name, why in found.get(title, {}).items())
    if found.get("left_out"):
        yield f"  no time for: {', '.join(found['left_out'])}"
