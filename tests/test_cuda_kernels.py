"""The way from CUDA tensors to the CUDA kernels, without a GPU: when it is taken, what is handed
over, and the sentences where kernels cannot compute."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from pretend_cuda import (
    CUDA,
    PretendCuda,
    PretendKernels,
    PretendTensor,
    pretend_cuda,
    pretend_kernels,
)
from samples import OP_NAMES, OPS, cumulative, op_calls, randn
from tolerance import assert_same_bits
from torch import Tensor

from xlmr_ext import (
    XLMRobertaConfig,
    XLMRobertaModel,
    _launch,
    _launch_encoder,
    build_info,
    cuda_support,
    fallback,
)
from xlmr_ext.cli import main


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> PretendKernels:
    return pretend_kernels(monkeypatch)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch, kernels: PretendKernels) -> Iterator[PretendCuda]:
    with pretend_cuda(monkeypatch) as mode:
        yield mode


def on_cuda(t: Tensor) -> Tensor:
    """All but a seed, which lies on the CPU everywhere."""
    return t if t.dtype == torch.int64 and t.numel() == 1 else t.to("cuda:0")


# --- What is handed over -------------------------------------------------------------------------


def test_ops_of_cuda_tensors_are_the_kernels(
    cuda: PretendCuda, kernels: PretendKernels, dtype: torch.dtype
) -> None:
    """The same integers go in as on the CPU: the same bits come out of the same code."""
    for call in op_calls(dtype):
        wanted = call.run()
        for got, expected in zip(call.mapped(on_cuda).run(), wanted, strict=True):
            assert got.device == CUDA
            assert_same_bits(got.to("cpu"), expected, call.op)
    assert {op for op, _ in kernels.called} == set(OP_NAMES)


def test_products_may_be_torchs(
    cuda: PretendCuda, kernels: PretendKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a notice: nothing is amiss. ``None`` is an environment that says nothing."""
    for value, ours in {"native": True, "torch": False, "auto": False, None: False}.items():
        monkeypatch.setattr(cuda_support, "gemm", cuda_support.chosen_gemm(value))
        kernels.called.clear()
        for call in op_calls(torch.float32):
            wanted = call.run()
            for got, expected in zip(call.mapped(on_cuda).run(), wanted, strict=True):
                torch.testing.assert_close(got.to("cpu"), expected, rtol=1e-4, atol=1e-5)
        products = {"linear_forward", "linear_backward"}
        products |= {"feed_forward_forward", "feed_forward_backward"}
        assert {op for op, _ in kernels.called} == set(OP_NAMES) - (set() if ours else products)
    with pytest.raises(
        ValueError, match=r"^XLMR_EXT_CUDA_GEMM=cublas: expected auto, native or torch$"
    ):
        cuda_support.chosen_gemm("cublas")


def test_a_workspace_is_torchs_and_as_large_as_was_asked(
    cuda: PretendCuda, kernels: PretendKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    empty = torch.empty

    def watched(*args: Any, **options: Any) -> Tensor:
        asked.append((args, options))
        return empty(*args, **options)

    monkeypatch.setattr(torch, "empty", watched)
    x, weight = (randn(n, 40, dtype=torch.float32).to("cuda:0") for n in (30, 40))
    OPS.linear_forward(x, [weight], [], None, "none")
    (op, none), (again, size) = kernels.called
    assert (op, again, none) == ("linear_forward", "linear_forward", 0)
    assert size > 0
    assert asked == [((size,), {"dtype": torch.uint8, "device": CUDA})]


def test_a_model_is_the_cpus(cuda: PretendCuda, kernels: PretendKernels) -> None:
    """Forward, dropout's masks included: they are a function of the seed wherever they are made."""
    torch.manual_seed(3)
    settings = {"vocab_size": 61, "hidden_size": 30, "num_hidden_layers": 2}
    more = {"num_attention_heads": 3, "intermediate_size": 37, "max_position_embeddings": 40}
    model = XLMRobertaModel(XLMRobertaConfig(**settings, **more)).train()
    ids, mask = torch.randint(2, 61, (3, 9)), torch.ones(3, 9, dtype=torch.int64)
    mask[1, 4:] = mask[2] = 0
    found = []
    for device in ("cpu", "cuda:0"):
        model.to(device)
        torch.manual_seed(5)
        with torch.no_grad():
            out = model(ids.to(device), mask.to(device))
        found.append(out.last_hidden_state.to("cpu"))
    assert_same_bits(*found)
    assert kernels.called


def test_a_large_gradient_of_words_stays_on_its_device(
    cuda: PretendCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xlmr_ext._launch._LAZY_BYTES", 0)
    for call in op_calls(torch.float32):
        if call.op == "embedding_backward":
            assert all(t.device == CUDA for t in call.mapped(on_cuda).run())


def test_the_host_reads_no_values(cuda: PretendCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = [call.mapped(on_cuda) for call in op_calls(torch.float32)]
    for name in ("item", "__int__", "__bool__", "__float__", "tolist"):
        monkeypatch.setattr(PretendTensor, name, lambda self: pytest.fail("the host waits"))
    monkeypatch.setattr(torch, "aminmax", lambda t: pytest.fail("the host waits"))
    for call in moved:
        call.run()


@pytest.fixture
def emulated(cuda: PretendCuda) -> Iterator[None]:
    """The kernels themselves, over the emulator, on the pretended device's memory."""
    if "simt" not in _launch.isas():
        pytest.skip("this build has no emulator")
    before = build_info()["table"]
    _launch.set_isa("simt")
    yield
    _launch.set_isa(before)


def test_ids_out_of_range_on_the_device(emulated: None) -> None:
    """Where the host cannot look at ids, a row of NaN says so."""
    tables = [randn(n, 8, dtype=torch.float32).to("cuda:0") for n in (5, 4, 2, 1, 1)]
    weight, bias = (t[0] for t in tables[3:])
    ids, places = (torch.tensor(t).to("cuda:0") for t in ([1, 5, -1, 2**40, 0], [0] * 5))
    y, *_ = OPS.embedding_forward(
        ids, None, places, None, *tables[:3], weight, bias, 1e-5, 0.0, 0, None
    )
    bad = torch.tensor([False, True, True, True, False])
    assert torch.equal(y.to("cpu").isnan().all(1), bad)
    assert y.to("cpu")[~bad].isfinite().all()


@pytest.mark.parametrize("offsets", [[0, 3, 2**30], [0, -(2**30), 6], [0, 2**30, 2**30]])
def test_offsets_out_of_range_on_the_device(emulated: None, offsets: list[int]) -> None:
    """Nothing beyond the rows is read or written, or the process would end."""
    query, key, value = (randn(6, 10, dtype=torch.float32).to("cuda:0") for _ in range(3))
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32).to("cuda:0")
    shape = (cu_seqlens, 6, 2, 0.5, 0.0, 0, None)
    out, lse = OPS.attention_forward(query, key, value, *shape)
    for result in OPS.attention_backward(out, query, key, value, out, lse, *shape):
        assert result.shape == (6, 10)


# --- What cannot be ------------------------------------------------------------------------------


def test_types_without_kernels_are_torchs(
    cuda: PretendCuda, kernels: PretendKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(fallback, "say_once", said.append)
    x, weight = (randn(n, 8, dtype=torch.float16).to("cuda:0") for n in (3, 8))
    y = OPS.linear_forward(x, [weight], [], None, "none")
    assert (y.dtype, y.device) == (torch.float16, CUDA)
    assert not kernels.called
    assert said == ["the CUDA kernels compute in float32, float64, not in float16"]


def test_a_type_of_no_kernel_is_named(cuda: PretendCuda) -> None:
    x, weight = (randn(n, 8, dtype=torch.float32).to("cuda:0") for n in (3, 8))
    with pytest.raises(
        TypeError, match=r"^linear: x is torch.int64; the CUDA kernels .* in float32, float64$"
    ):
        OPS.linear_forward(x.long(), [weight], [], None, "none")


def test_tensors_on_two_devices(cuda: PretendCuda, kernels: PretendKernels) -> None:
    x, weight = randn(3, 4, dtype=torch.float32), randn(4, 4, dtype=torch.float32)
    far = x.to("cuda:0"), weight.to("cuda:0")
    norm, seed = (far[0], None, far[1][0], far[1][1], 1e-5, 0.5, 0), torch.tensor([3])
    calls = [
        (lambda: OPS.linear_forward(far[0], [weight], [], None, "none"), "weight 0 is on cpu; exp"),
        (lambda: OPS.linear_forward(x, [far[1]], [], None, "none"), "weight 0 is on cuda:0; expec"),
        (
            lambda: OPS.attention_forward(*(far[0],) * 3, cumulative([3]), 3, 2, 1.0, 0.0, 0, None),
            r"cu_seqlens has shape \[2\] on cpu; expected \[batch \+ 1\] on cuda:0",
        ),
        (
            lambda: OPS.layer_norm_forward(*norm, seed.to("cuda:0"), True),
            r"seed is torch.int64 \[1\] on cuda:0; expected one int64 on the CPU",
        ),
    ]  # fmt: skip
    for call, sentence in calls:
        with pytest.raises(ValueError, match=sentence):
            call()
    assert not kernels.called


def test_packing_is_for_the_cpu(cuda: PretendCuda) -> None:
    weight = randn(4, 4, dtype=torch.float32).to("cuda:0")
    with pytest.raises(ValueError, match=r"^pack_weight: weight is on cuda:0; expected the CPU$"):
        _launch_encoder.pack_weight(weight)


def test_a_launch_that_fails(cuda: PretendCuda, kernels: PretendKernels) -> None:
    kernels.fails = "on the GPU: kernel gemm did not start: cudaErrorIllegalAddress"
    x = randn(3, 3, dtype=torch.float32).to("cuda:0")
    with pytest.raises(RuntimeError, match="kernel gemm did not start"):
        OPS.linear_forward(x, [x], [], None, "none")


MACHINES = [
    ("cudaErrorInsufficientDriver", 0, "the CUDA kernels find no NVIDIA driver"),
    (
        "cudaErrorInsufficientDriver",
        12040,
        "the NVIDIA driver is too old for the CUDA kernels: it knows CUDA 12.4, they were built "
        "with 13.0",
    ),
    ("cudaErrorNoDevice", 13010, "the CUDA kernels find no GPU (cudaErrorNoDevice)"),
    ("", 13010, None),
]


@pytest.mark.parametrize(("error", "driver", "sentence"), MACHINES)
def test_machines(error: str, driver: int, sentence: str | None, kernels: PretendKernels) -> None:
    machine = {"error": error, "driver": driver, "capabilities": [] if error else [90]}
    assert cuda_support.machine_refusal(machine, 13000) == sentence
    kernels.machine = lambda: machine  # type: ignore[method-assign]
    assert cuda_support.refusal(0, torch.float32) == sentence


def test_gpus() -> None:
    built = ("80-real", "90-real", "90-virtual")
    assert cuda_support.device_refusal(1, [75, 80], built) is None
    assert cuda_support.device_refusal(0, [75, 80], built) == (
        "the CUDA kernels were built for 80-real, 90-real, 90-virtual, and cuda:0 has compute "
        "capability 7.5"
    )
    assert cuda_support.device_refusal(2, [75, 80], built) == (
        "the CUDA kernels find 2 GPUs, and cuda:2 is none of them"
    )


@pytest.mark.parametrize(
    ("architecture", "capabilities"),
    [
        ("80-real", {80, 86, 89}),
        ("86-real", {86, 89}),
        ("90-real", {90}),
        ("90a-real", {90}),
        ("90-virtual", {90, 100, 103, 120, 121}),
        ("80", {80, 86, 89, 90, 100, 103, 120, 121}),
        ("120-real", {120, 121}),
        ("native", {75, 80, 86, 89, 90, 100, 103, 120, 121}),
    ],
)
def test_what_runs_on_what(architecture: str, capabilities: set[int]) -> None:
    every = {75, 80, 86, 89, 90, 100, 103, 120, 121}
    assert {c for c in every if cuda_support.runs_on(c, architecture)} == capabilities


def test_a_build_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    sentence = "this build of xlmr_ext has no CUDA kernels"
    monkeypatch.setattr(cuda_support, "_cuda", None)
    monkeypatch.setattr(cuda_support, "_not_loaded", sentence)
    assert cuda_support.refusal.__wrapped__(0, torch.float32) == sentence
    with pytest.raises(RuntimeError, match=f"^{sentence}$"):
        cuda_support.module()
    info = build_info()
    assert (info["cuda"], info["cuda_kernels"]) == (False, {})


def test_info(kernels: PretendKernels, capsys: pytest.CaptureFixture[str]) -> None:
    kernels.machine = lambda: {  # type: ignore[method-assign]
        "error": "", "driver": 13000, "capabilities": [90, 75],
    }  # fmt: skip
    assert build_info()["cuda_kernels"] == {
        "compiler": "pretended",
        "runtime": "13.0",
        "architectures": ["90-real", "90-virtual"],
        "types": ["float32", "float64"],
        "gemm": "native",
        "cuda:0": "runs the CUDA kernels",
        "cuda:1": "the CUDA kernels were built for 90-real, 90-virtual, and cuda:1 has compute "
        "capability 7.5",
    }
    assert main(["info"]) == 0
    said = capsys.readouterr().out
    assert "\n  architectures " in said
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cuda"] is True


# --- The module as it was built ------------------------------------------------------------------


@pytest.mark.skipif(not cuda_support.is_built(), reason="this build has no CUDA kernels")
@pytest.mark.skipif(torch.cuda.is_available(), reason="torch has a GPU here")
def test_the_module_without_a_driver() -> None:
    module = cuda_support.module()
    refused = cuda_support.refusal(0, torch.float32)
    assert refused is not None
    assert refused == cuda_support.machine_refusal(module.machine(), module.runtime)
    x = torch.ones(2, 2)
    sizes = (0, 0, 2, 2, 2, x.data_ptr(), 2, [x.data_ptr()], [], 0, 0, [x.data_ptr()], 2)
    with pytest.raises(
        RuntimeError,
        match=r"^on the GPU: kernel linear_forward did not start: cuda\w+ \(1 blocks of 128 .*, "
        r"device 0\)$",
    ):
        module.linear_forward(*sizes, 0, 0, x.data_ptr(), 1 << 20)
    assert torch.equal(x, torch.ones(2, 2))
