"""Fixtures that every test shares: the table, device and dtype under test, seeds, data."""

from __future__ import annotations

import os
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from xlmr_ext import XLMRobertaConfig

DTYPES = [torch.float32, torch.float64]


def _isas() -> list[str]:
    """The tables that this build has and this processor runs; of tables that differ in their 8-bit
    products alone, the fastest. ``simt``, the CUDA kernels under the emulator, is one where built.
    """
    try:
        from xlmr_ext import _C, _launch
    except ImportError:
        # Collected all the same, so that the tests fail instead of vanishing.
        return ["not-built"]
    forced = os.environ.get("XLMR_EXT_ISA")
    if forced:
        return [forced]
    before, names = _C.table_name(), {}
    for name in _launch.isas():
        _launch.set_isa(name)
        names[_C.layout_name()] = name
    _launch.set_isa(before)
    return list(names.values())


def no_cuda_kernels() -> str | None:
    """Why nothing can be tested on a GPU here; None where it can."""
    from xlmr_ext import cuda_support

    if not torch.cuda.is_available():
        return "torch has no GPU here"
    return cuda_support.refusal(0, torch.float32)


def _places() -> list[Any]:
    """Where an op is computed: each table on the CPU, and a GPU."""
    places: list[Any] = [(isa, "cpu") for isa in _isas()]
    if os.environ.get("XLMR_EXT_ISA") or places == [("not-built", "cpu")]:
        return places
    reason = no_cuda_kernels()
    marks = pytest.mark.skipif(reason is not None, reason=str(reason))
    return [*places, pytest.param("cuda", "cuda", marks=marks)]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    skip = pytest.mark.skip(reason="slow: needs --slow")
    for item in items:
        if item.get_closest_marker("slow") is not None:
            item.add_marker(skip)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    # The table varies slowest, so that a failure list reads table by table.
    if "device" in metafunc.fixturenames:
        metafunc.parametrize(("isa", "device"), _places(), indirect=["isa"])
    elif "isa" in metafunc.fixturenames:
        metafunc.parametrize("isa", _isas(), indirect=True)
    if "dtype" in metafunc.fixturenames:
        metafunc.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@pytest.fixture(scope="session", autouse=True)
def _away_from_the_source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A Python started in the checkout would import the source tree, not what is installed."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("cwd"))
    yield
    os.chdir(before)


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    """The same random numbers in a test whether it runs alone or in the whole suite."""
    torch.manual_seed(zlib.crc32(request.node.name.encode()))


@pytest.fixture
def every_isa() -> Iterator[list[str]]:
    """All tables of processors; the test calls ``_launch.set_isa`` itself."""
    from xlmr_ext import _launch

    yield [name for name in _launch.isas() if name != "simt"]
    _launch.set_isa(os.environ.get("XLMR_EXT_ISA") or _launch.isas()[-1])


@pytest.fixture
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Runs the test on this table of kernels; the name of it, ``cuda`` on a GPU."""
    from xlmr_ext import _launch, cuda_support

    if request.param == "cuda":
        monkeypatch.setattr(cuda_support, "gemm", "native")
    else:
        _launch.set_isa(request.param)
    yield request.param
    _launch.set_isa(os.environ.get("XLMR_EXT_ISA") or _launch.isas()[-1])


@pytest.fixture
def restore_threads() -> Iterator[None]:
    """Lets the test call torch.set_num_threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def cli(
    capfd: pytest.CaptureFixture[str], restore_threads: None
) -> Callable[..., tuple[int, str, str]]:
    """Runs the command in this process: exit code, stdout, stderr."""
    from xlmr_ext.cli import main

    def call(name: str, *arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main([name, "--threads", "1", *map(str, arguments)])
        sys.stdout.flush()
        return code, *capfd.readouterr()

    return call


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of data beyond the repository, $XLMR_EXT_DATA; skips where there is none."""
    value = os.environ.get("XLMR_EXT_DATA")
    if not value:
        pytest.skip("XLMR_EXT_DATA is not set: no data beyond the repository")
    path = Path(value)
    if not path.is_dir():
        pytest.fail(f"XLMR_EXT_DATA: {value} is not a directory")
    return path


@pytest.fixture
def make_tiny_config() -> Callable[..., XLMRobertaConfig]:
    """Makes configurations whose sizes are no multiples of a vector; models of them run at once."""
    from xlmr_ext import XLMRobertaConfig

    values: dict[str, Any] = {
        "vocab_size": 61,
        "hidden_size": 30,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 37,
        "max_position_embeddings": 40,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "num_labels": 3,
    }
    return lambda **overrides: XLMRobertaConfig(**{**values, **overrides})


@pytest.fixture
def tiny_config(make_tiny_config: Callable[..., XLMRobertaConfig]) -> XLMRobertaConfig:
    return make_tiny_config()
