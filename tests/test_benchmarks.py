"""compare.py, roofline.py and gpu_check.py of benchmarks: what they compute, and a run of each on a
tiny model."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
TINY = ["--layers", "2", "--hidden", "32", "--heads", "2", "--inner", "48", "--vocabulary", "50"]
WAYS = ("native", "torch", "fallback")
QUICK = ["--rounds", "2", "--seconds", "0.001", "--tries", "1", "--threads", "1"]


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(FOLDER / script), *arguments],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.parametrize("script", ["compare.py", "roofline.py", "gpu_check.py"])
def test_help(script: str) -> None:
    done = run(script, "--help")
    assert done.returncode == 0, done.stderr
    assert "--rounds" in done.stdout or "--minutes" in done.stdout


@pytest.mark.parametrize(
    "command", [("compare.py",), ("roofline.py",), ("gpu_check.py", "--cases")]
)
def test_a_case_that_does_not_exist(command: tuple[str, ...]) -> None:
    done = run(*command, "8x9000")
    assert done.returncode == 2
    assert "case '8x9000'" in done.stderr


def test_cases() -> None:
    from peers.cases import Shape, batch_of, lengths_of

    assert lengths_of("8x128") == [128] * 8
    ragged = lengths_of("ragged")
    assert (len(ragged), sum(ragged), min(ragged), max(ragged)) == (32, 785, 5, 55)
    mixed, uniform = lengths_of("mixed"), lengths_of("6x340")
    assert sum(mixed) == sum(uniform)
    assert sum(n * n for n in mixed) == sum(n * n for n in uniform)
    longer = lengths_of("ragged128")
    assert (len(longer), sum(longer), min(longer), max(longer)) == (128, 6737, 5, 128)
    batch = batch_of("ragged", 50)
    assert batch.input_ids.shape == batch.attention_mask.shape == (32, 55)
    np.testing.assert_array_equal(batch.attention_mask.sum(1), batch.lengths)
    np.testing.assert_array_equal(batch.input_ids[batch.attention_mask == 0], 1)
    assert batch.input_ids.max() < 50
    # A layer of width 1 with heads of 1: 4 + 2 weights a token, and scores and their sums.
    assert Shape(1, 1, 1, 1).flops([2, 1]) == 2 * 6 * 3 + 4 * (4 + 1)


def test_the_environment_of_an_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    from peers.limits import environment, limits

    monkeypatch.setenv("XLMR_EXT_ISA", "baseline")
    with environment(limits("best")):
        assert "XLMR_EXT_ISA" not in os.environ
    with environment({**limits("avx2"), "MORE": "1"}):
        assert os.environ["XLMR_EXT_ISA"] == os.environ["ATEN_CPU_CAPABILITY"] == "avx2"
        assert os.environ["MORE"] == "1"
    assert os.environ["XLMR_EXT_ISA"] == "baseline"
    assert "MORE" not in os.environ


def test_ratios_are_of_the_fastest_of_a_precision() -> None:
    from peers.report import ratios

    medians = {"xlmr_ext": [1.0, 2.0, 1.0], "a": [2.0, 2.0, 9.0], "b": [3.0, 3.0, 3.0],
               "xlmr_ext int8": [1.0, 1.0, 1.0]}  # fmt: skip
    precisions = {name: "int8" if "int8" in name else "float32" for name in medians}
    assert ratios(medians, precisions) == {
        "float32": {"fastest": "a", "ratio": [1.5, 2.0, 5.5]}
    }  # int8 has nobody to be compared with


def test_a_library_that_computes_something_else_is_not_timed() -> None:
    import compare
    from peers.cases import Batch, Shape
    from peers.peer import AbsentError
    from peers.process import Turn

    class Stub:
        precision, computes = "float32", "classifier"

        def __init__(self, output: list[float]) -> None:
            self.output, self.ways, self.process = output, [self], self
            self.environment: dict[str, str] = {}

        def prepare(self, batch: Batch) -> list[dict[str, Any]]:
            if not self.output:
                raise AbsentError("too long")
            return [{"classifier": np.array([self.output], dtype=np.float32)}]

        def fastest(self, seconds: float, tries: int) -> int:
            return 0

        def turn(self, seconds: float) -> Turn:
            return Turn([0.5, 0.25], 0.0)

    libraries: dict[str, Any] = {
        "transformers": Stub([1, 2]), "xlmr_ext": Stub([1, 2]), "openvino": Stub([2, 1]),
        "onnxruntime": Stub([1, 2, 3]), "ctranslate2": Stub([]),
    }  # fmt: skip
    arguments = argparse.Namespace(
        peers=list(libraries), rounds=3, seconds=0.0, tries=1, seed=0, train=False
    )
    found = compare.measured("2x4", libraries, arguments, Shape(1, 2, 1, 2, 50))
    timed = {name for name, result in found["libraries"].items() if "milliseconds" in result}
    assert timed == {"transformers", "xlmr_ext"}
    assert found["libraries"]["openvino"]["cosine"] == pytest.approx(0.8)
    assert found["libraries"]["onnxruntime"]["cosine"] == 0.0
    assert found["libraries"]["ctranslate2"] == {"failed": "too long"}
    assert found["libraries"]["xlmr_ext"]["milliseconds"] == [375.0, 375.0, 375.0]
    assert found["ratios"]["float32"] == {"fastest": "transformers", "ratio": [1.0, 1.0, 1.0]}


def test_compare(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    options = [*TINY, *QUICK, "--cache", str(tmp_path / "cache"), "--output", str(tmp_path / "all")]
    names = ["xlmr_ext", "xlmr_ext int8", "transformers", "ctranslate2"]
    done = run("compare.py", "2x8", "ragged", *options, "--peers", *names)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "all.json").read_text())
    assert set(results["libraries"]) | set(results["absent"]) == set(names)
    assert set(results["cases"]) == {"2x8", "ragged"}
    for case in results["cases"].values():
        assert {"xlmr_ext", "transformers"} <= set(case["libraries"])
        for name, found in case["libraries"].items():
            assert found["cosine"] > (0.98 if "int8" in name else 0.99999), name
            assert found["milliseconds"][1] > 0
            assert len(found["turns"]) == 2
        assert case["ratios"]["float32"]["ratio"][1] > 0
    assert results["cases"]["ragged"]["padded_tokens"] == 32 * 55
    assert "transformers" in done.stdout
    assert "| milliseconds | 2x8 | ragged |" in (tmp_path / "all.md").read_text()
    pytest.importorskip("matplotlib")
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")


def test_compare_in_training(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    options = [*TINY, *QUICK, "--cache", str(tmp_path / "cache"), "--output", str(tmp_path / "t")]
    done = run("compare.py", "--train", "2x8", *options, "--peers", "xlmr_ext", "onnxruntime")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "t.json").read_text())
    assert results["absent"] == {"onnxruntime": "not for training"}
    assert results["cases"]["2x8"]["libraries"]["xlmr_ext"]["cosine"] > 0.99999
    # The same file does not take cases of another kind of run.
    done = run("compare.py", "2x8", *options, "--peers", "xlmr_ext")
    assert done.returncode == 1
    assert "another kind of run: its what differ" in done.stderr


@pytest.mark.parametrize("lengths", [[5, 3], [1]])
def test_roofline_calls_every_function(lengths: list[int]) -> None:
    import roofline
    from peers.cases import Shape

    shape = Shape(2, 32, 2, 48, 1000)
    functions = roofline.works(shape, lengths, backward=True)
    wholes = roofline.passes(shape, lengths, backward=True)
    for work in functions + wholes:
        work.call()
    # The parts' arithmetic is the passes'.
    forward = sum(work.times * work.flops for work in functions if not work.name.endswith("'"))
    assert forward == shape.flops(lengths) == wholes[0].flops


def test_the_peaks_compile() -> None:
    command = ["c++", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
    done = subprocess.run(
        [*command, str(FOLDER / "roofline.cpp")], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


# --- gpu_check.py --------------------------------------------------------------------------------


def test_gpu_check_rehearsed(tmp_path: Path) -> None:
    """All of it but the build, and what a GPU is asked, on the CPU."""
    pytest.importorskip("transformers")
    file = tmp_path / "found" / "check.json"
    done = run("gpu_check.py", "--rehearse", "--output", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(file.read_text())
    assert results["rehearsal"] is True
    assert {"device", "machine", "versions", "settings", "shape"} <= set(results)
    sections = results["sections"]
    assert [*sections] == ["package", "tests", "speed", "kernels"]
    assert {section["status"] for section in sections.values()} == {"passed"}
    assert sections["tests"]["passed"] > 1
    speed = sections["speed"]["dtypes"]["float32"]
    assert [*speed["absent"]] == ["transformers flash_attention_2"]
    libraries = {"transformers sdpa", *(f"xlmr_ext {way}" for way in WAYS)}
    for kind in ("forward", "training"):
        found = speed["cases"]["2x8"][kind]
        assert set(found) == libraries
        for library, result in found.items():
            assert result["cosine"] > 0.9999, library
            assert 0 < result["milliseconds"][0] <= result["milliseconds"][2]
            assert result["megabytes"] is None
    kernels = sections["kernels"]["dtypes"]["float32"]
    assert kernels["peaks"]["flops"] > 0
    ops = {(op["way"], op["op"]): op for op in kernels["cases"]["2x8"]["ops"]}
    names = {name for way, name in ops if way == "native"}
    assert {"attention", "attention'", "embedding'", "feed-forward'"} <= names
    assert names == {name for way, name in ops if way == "fallback"}
    assert {name for way, name in ops if way == "torch"} == {
        f"{name}{end}" for name in ("query, key, value", "attention's output", "feed-forward")
        for end in ("", "'")
    }  # fmt: skip
    for op in ops.values():
        assert op["microseconds"][1] > 0
        assert op["of_roof"] == pytest.approx(max(op["of_peak"], op["of_bandwidth"]))
        assert op["of_roof"] > 0
    for line in ("xlmr_ext native", "transformers sdpa", "measured peaks", "feed-forward'"):
        assert line in done.stdout


def test_gpu_check_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = run("gpu_check.py", "--output", str(tmp_path / "check.json"))
    assert done.returncode == 1
    assert done.stderr == (
        "gpu_check.py: torch finds no GPU here; --rehearse runs the same on the CPU.\n"
    )
    assert not list(tmp_path.iterdir())


def test_a_section_of_gpu_check_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The others are run and kept; what failed is said, and the exit status is 1."""
    import gpu_check
    from gpu import suite

    def broken(*arguments: Any) -> Any:
        raise RuntimeError("pytest ended with exit status 4")

    def partly(name: str, *arguments: Any) -> dict[str, Any]:
        case = {"forward": {"xlmr_ext native": {"failed": "out of range"}}}
        found = {"float32": {"cases": {"8x128": {"tokens": 1024, **case}}, "died": {}}}
        return {"dtypes": found if name == "speed" else {"float32": {"cases": {}}}}

    file = tmp_path / "check.json"
    monkeypatch.setattr(suite, "run_tests", broken)
    monkeypatch.setattr(gpu_check, "by_dtype", partly)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--rehearse", "--output", str(file)])
    with pytest.raises(SystemExit) as ended:
        gpu_check.main()
    assert ended.value.code == 1
    sections = json.loads(file.read_text())["sections"]
    assert {name: section["status"] for name, section in sections.items()} == {
        "package": "passed", "tests": "failed", "speed": "failed", "kernels": "passed"
    }  # fmt: skip
    said = capsys.readouterr().out
    assert "pytest ended with exit status 4" in said
    assert "out of range" in said


def test_a_kernel_that_ends_its_process(tmp_path: Path) -> None:
    """Another process measures the rest, and the findings say where the first one ended."""
    from gpu import process

    (tmp_path / "section.py").write_text(
        "import os\n"
        "def run(plan, clock, progress):\n"
        "    for way in plan['ways']:\n"
        "        progress.running(way, '8x128 forward')\n"
        "        if way == 'crashes':\n"
        "            os.abort()\n"
        "        progress.found[way] = clock.device\n"
        "        progress.write()\n"
        "    if plan['ways'] == ['c']:\n"
        "        raise ValueError('lost')\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(FOLDER)])}
    plan = {"section": "section", "device": "cpu", "ways": ["a", "crashes", "b"]}
    found = process.measured(plan, tmp_path, environment, 60)
    died = found.pop("died")
    assert found == {"a": "cpu", "b": "cpu"}
    assert died == {"crashes": "exit status -6 (no message) in 8x128 forward"}
    found = process.measured({**plan, "ways": ["c"]}, tmp_path, environment, 60)
    assert found == {
        "c": "cpu", "died": {"c": "exit status 1 (ValueError: lost) in 8x128 forward"}
    }  # fmt: skip


def test_a_program_that_hangs(tmp_path: Path) -> None:
    """It is killed, and so is what it started."""
    from gpu import limited

    sign, child, log = (tmp_path / name for name in ("sign", "child", "log"))
    program = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen(['sleep', '600'])\n"
        f"open({str(child)!r}, 'w').write(str(child.pid))\n"
        "for _ in range(int(sys.argv[1])):\n"
        f"    open({str(sign)!r}, 'w').write('alive')\n"
        "    time.sleep(0.2)\n"
        "time.sleep(600)\n"
    )
    for signs, seconds, sentence in (("0", 60, "no sign of life for 2 s"),
                                     ("600", 4, "no end after 4 s")):  # fmt: skip
        command = [sys.executable, "-c", program, signs]
        with pytest.raises(limited.OverdueError, match=f"^{sentence}$"):
            limited.run(command, log, seconds, os.environ, tmp_path, sign, 2.0)
        state = Path(f"/proc/{child.read_text()}/stat")
        assert not state.exists() or state.read_text().split()[2] == "Z"
        child.unlink()


def test_gpu_check_compares_before_it_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    from dataclasses import asdict

    import torch
    from gpu import speed
    from gpu.clock import WallClock
    from gpu.process import Progress
    from peers.cases import Shape

    from xlmr_ext import cuda_support
    from xlmr_ext.heads import XLMRobertaForSequenceClassification as Ours

    right = Ours.forward

    def forward(self: Any, *args: Any, **options: Any) -> Any:
        """Wrong by the kernels' own products, without memory by torch's alone."""
        out = right(self, *args, **options)
        if cuda_support.gemm == "native":
            out["logits"] = out.logits.flip(1)
        if cuda_support.refusal(0, torch.float32) == "it is the fallback's turn":
            raise torch.OutOfMemoryError
        return out

    monkeypatch.setattr(Ours, "forward", forward)
    monkeypatch.setattr(cuda_support, "gemm", "torch")
    plan = {
        "dtype": "float32", "shape": asdict(Shape(2, 32, 2, 48, 50)), "cases": ["2x8"], "rounds": 2,
        "ways": list(speed.LIBRARIES), "seconds": 60.0, "turn": 0.0,
    }  # fmt: skip
    progress = Progress(tmp_path / "result.json")
    speed.run(plan, WallClock(), progress)
    found = json.loads(progress.path.read_text())["cases"]["2x8"]["forward"]
    assert {name for name, result in found.items() if "milliseconds" in result} == {
        "transformers sdpa", "xlmr_ext torch"
    }  # fmt: skip
    assert found["xlmr_ext native"]["failed"].startswith("its cosine with transformers sdpa is ")
    assert found["xlmr_ext fallback"]["absent"] == "out of memory"
    assert found["xlmr_ext torch"]["faster"][1] > 0


def test_time_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of a device, in its order; the device itself is not there."""
    import torch
    from gpu.clock import CudaClock

    done: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            done.append("record")

        def synchronize(self) -> None:
            done.append("wait for the end")

        def elapsed_time(self, end: Event) -> float:
            return 6.0

    def note(name: str, value: int = 0) -> Any:
        return lambda *arguments: done.append(name) or value

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", note("wait"))
    monkeypatch.setattr(torch.cuda, "_sleep", note("sleep"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", note("now", 100))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", note("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", note("most", 170))
    clock, call = CudaClock(), note("call")
    assert clock.seconds(call, 3) == pytest.approx(0.002)
    turn = ["record", "call", "call", "call", "record", "wait for the end"]
    assert done == ["wait", *turn]
    done.clear()
    clock.seconds(call, 3, ahead=True)
    assert done == ["wait", "call", "call", "call", "wait", "sleep", *turn]
    done.clear()
    assert clock.peak_bytes(call) == 70
    assert done == ["wait", "now", "reset", "call", "wait", "most"]


def test_ways_to_compute_on_a_gpu() -> None:
    from gpu.ways import computed_by

    from xlmr_ext import cuda_support

    before = cuda_support.gemm, cuda_support.refusal
    for way in ("native", "torch"):
        with computed_by(way):
            assert (cuda_support.gemm, cuda_support.refusal) == (way, before[1])
    with computed_by("fallback"):
        assert cuda_support.refusal(0, None)
    assert (cuda_support.gemm, cuda_support.refusal) == before
