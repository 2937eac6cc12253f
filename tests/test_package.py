"""The package as a whole: what importing it costs and touches, and the layers of its sources."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import xlmr_ext
from xlmr_ext import cuda_support

PACKAGE = Path(xlmr_ext.__file__).parent
CSRC = Path(__file__).parents[1] / "csrc"
# Lowest first; a module may import what stands before it, itself or through others.
LAYERS = [
    ("_C", "cuda_support"),
    "_native",
    "_launch",
    ("ops", "files", "formats.weights_file"),
    ("autograd", "weights"),
    "linear_cross_entropy",
    "checkpoint",
    "pretrained",
    "modeling",
    ("heads", "masked_lm"),
    ("prediction", "corpus.mixture"),
    "tasks.base",
    ("tasks.classification", "tasks.tokens", "tasks.answers", "tasks.choice"),
    ("training", "inference", "tasks.entities", "tasks.question_answerer"),
    ("tasks.embeddings", "tasks.fill_mask", "tasks.zero_shot"),
    ("pipelines", "report"),
    ("cli.task_arguments", "cli.reporting"),
    ("cli.finetune", "cli.pretrain", "cli.predict", "cli.eval"),
    "cli",
]


def run_python(program: str, cwd: Path) -> str:
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300, cwd=cwd
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


# --- Importing -----------------------------------------------------------------------------------

EVERYTHING_PUBLIC = """
import sys, xlmr_ext
for name in xlmr_ext.__all__:
    getattr(xlmr_ext, name)
import xlmr_ext.cli, xlmr_ext.training, xlmr_ext.reference
"""


@pytest.mark.parametrize("program", ["import sys, xlmr_ext", EVERYTHING_PUBLIC])
def test_import_touches_no_test_dependency(program: str, tmp_path: Path) -> None:
    out = run_python(
        f"{program}\nprint(*sorted({{m.split('.')[0] for m in sys.modules}}))", tmp_path
    )
    strangers = {
        "transformers", "tokenizers", "peft", "accelerate", "matplotlib", "pytest", "hypothesis",
    }  # fmt: skip
    assert "xlmr_ext" in out.split()
    assert strangers.isdisjoint(out.split())


def test_import_cost_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # A limit would measure the machine; the numbers are for the reader, in turn so that a busy
    # moment hits both.
    program = (
        "import time; a = time.perf_counter(); import torch; b = time.perf_counter(); {}; "
        "print(b - a, time.perf_counter() - b)"
    )
    cases = {
        "import xlmr_ext": "import xlmr_ext",
        "the same and the classifier": "import xlmr_ext; "
        "xlmr_ext.XLMRobertaForSequenceClassification; xlmr_ext.XLMRobertaTokenizer",
    }
    torch_seconds: list[float] = []
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(3):
        for name, statement in cases.items():
            first, second = map(float, run_python(program.format(statement), tmp_path).split())
            torch_seconds.append(first)
            seconds[name].append(second)
    assert all(second > 0 for values in seconds.values() for second in values)
    with capsys.disabled():
        print(f"\nimport torch: {statistics.median(torch_seconds):.3f} s (median)")
        for name, values in seconds.items():
            print(f"{name}, torch being there: {statistics.median(values):.3f} s (median)")


# --- What the package says of itself --------------------------------------------------------------


def test_version_is_the_installed_one() -> None:
    assert xlmr_ext.__version__ == importlib.metadata.version("xlmr_ext")


def test_all_names_exist() -> None:
    assert sorted(xlmr_ext.__all__) == dir(xlmr_ext)
    for name in xlmr_ext.__all__:
        assert getattr(xlmr_ext, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = xlmr_ext.no_such_name


def test_build_info() -> None:
    info = xlmr_ext.build_info()
    assert set(info) >= {
        "version", "python", "torch", "compiler", "openmp", "tables_built", "tables_usable",
        "table", "table_reason", "bf16_units", "threads", "threads_by", "cuda", "cuda_kernels",
    }  # fmt: skip
    assert info["version"] == xlmr_ext.__version__
    assert "baseline" in info["tables_built"]
    assert set(info["tables_usable"]) <= set(info["tables_built"])
    assert info["table"] in info["tables_usable"]
    assert info["threads"] >= 1
    json.dumps(info)  # plain values, for a bug report


@pytest.mark.parametrize("name", ["_C", "_cuda"])
def test_stub_names_what_the_native_module_has(name: str) -> None:
    if name == "_cuda" and not cuda_support.is_built():
        pytest.skip("this build has no CUDA kernels")
    module = importlib.import_module(f"xlmr_ext.{name}")
    stub = ast.parse((PACKAGE / f"{name}.pyi").read_text())
    named = {node.name for node in stub.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    named |= {
        node.target.id
        for node in stub.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    assert named == {name for name in vars(module) if not name.startswith("__")}


def test_typed_marker_is_installed() -> None:
    assert (PACKAGE / "py.typed").is_file()


# --- Layers --------------------------------------------------------------------------------------


def modules() -> dict[str, Path]:
    """Python sources by their name below the package; "" is the package itself."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def runtime_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node, except under ``if TYPE_CHECKING:``."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for other in node.orelse:
                yield other
                yield from runtime_nodes(other)
            continue
        yield node
        yield from runtime_nodes(node)


def imports(path: Path, known: set[str]) -> set[str]:
    """The package's modules that a source imports, at any depth of its functions."""
    found = set()
    for node in runtime_nodes(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("xlmr_ext."):
                    found.add(alias.name.removeprefix("xlmr_ext."))
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are absolute here"
            if node.module == "xlmr_ext":
                for alias in node.names:
                    home = xlmr_ext._HOME.get(alias.name, f"xlmr_ext.{alias.name}")
                    found.add(home.removeprefix("xlmr_ext."))
            elif node.module is not None and node.module.startswith("xlmr_ext."):
                base = node.module.removeprefix("xlmr_ext.")
                for alias in node.names:
                    below = f"{base}.{alias.name}"
                    found.add(below if below in known else base)
    return found & known


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    known = set(modules()) | {"_C", "_cuda"}
    return {name: imports(path, known) for name, path in modules().items() if name != ""} | {
        "_C": set(),
        "_cuda": set(),
    }


def reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    found: set[str] = set()
    waiting = [start]
    while waiting:
        for name in graph[waiting.pop()] - found:
            found.add(name)
            waiting.append(name)
    return found


def test_imports_run_downwards(graph: dict[str, set[str]]) -> None:
    rank = {
        name: level
        for level, names in enumerate(LAYERS)
        for name in ((names,) if isinstance(names, str) else names)
    }
    assert set(rank) - set(graph) <= {"inference"}, "a layer has gone or changed its name"
    upwards = [
        f"{name} reaches {other}"
        for name in rank.keys() & graph.keys()
        for other in sorted(reachable(graph, name) & rank.keys())
        if rank[other] >= rank[name]
    ]
    assert not upwards


def test_imports_make_no_circle(graph: dict[str, set[str]]) -> None:
    assert not [name for name in graph if name in reachable(graph, name)]


def test_native_code_has_two_doors(graph: dict[str, set[str]]) -> None:
    """One for the ops, one for the frozen encoder; both call through one module."""
    doors = {"_launch", "_launch_encoder"}
    # mapped_memory tells the system's kernel of addresses, not ours.
    users = {name for name, targets in graph.items() if "_native" in targets}
    assert users - {"mapped_memory"} == doors
    assert {name for name, targets in graph.items() if "_C" in targets} == doors | {"_native"}
    assert {name for name, targets in graph.items() if "_cuda" in targets} == {"cuda_support"}
    # The command line prints build_info(), and imports it before it sets the threads.
    users = {name for name, targets in graph.items() if "_launch" in targets}
    assert users <= {"ops", "_launch_encoder", "cli.console", "cli.info", "cli.quantize"}
    # Addresses go to native code from one place; the readers of weights only compare them.
    users = {name for name, path in modules().items() if "data_ptr" in path.read_text()}
    readers = {"weights", "formats.weights_file", "formats.frozen_file"}
    assert users - readers == {"_native"}


def test_reference_is_never_a_path_of_production(graph: dict[str, set[str]]) -> None:
    assert not [name for name, targets in graph.items() if "reference" in targets]


def sources() -> list[Path]:
    found = sorted(p for p in CSRC.rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"})
    assert found, f"no C++ sources in {CSRC}"
    return found


def code(path: Path) -> str:
    """A C++ source without its comments."""
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)


def test_native_core_knows_no_torch() -> None:
    mentions = [
        f"{path.relative_to(CSRC)}: {match.group()}"
        for path in sources()
        for match in re.finditer(r"\b(torch|ATen|c10|at::)\w*", code(path), re.IGNORECASE)
    ]
    assert not mentions


def test_one_file_sees_openmp() -> None:
    users = [
        str(path.relative_to(CSRC))
        for path in sources()
        if re.search(r"\bomp\.h\b|#\s*pragma\s+omp\b|\bomp_\w+\(", code(path))
    ]
    assert users == ["core/team_openmp.cpp"]


def test_kernels_include_no_standard_containers() -> None:
    # Templates of the standard library have external linkage: the linker would keep one copy for
    # all instruction sets.
    allowed = re.compile(r'#\s*include\s+("|<(c?stdint|c?string|c?math|immintrin|arm_neon)(\.h)?>)')
    others = [
        f"{path.relative_to(CSRC)}: {line}"
        for path in sources()
        if path.parts[len(CSRC.parts)] == "cpu"
        for line in path.read_text().splitlines()
        if re.match(r"#\s*include", line) and not allowed.match(line)
    ]
    assert not others
