"""Bit for bit: a row's result does not depend on its batch, the threads, the run or the fork."""

from __future__ import annotations

import ctypes
import multiprocessing
import platform
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection

import pytest
import torch
from samples import OP_NAMES, OPS, OpCall, cumulative, op_calls, randn
from tolerance import assert_same_bits
from torch import Tensor

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc or forks: Linux only")


def large_calls(dtype: torch.dtype = torch.float32) -> dict[str, list[OpCall]]:
    """Calls by op, with enough work to be split over threads."""
    calls: dict[str, list[OpCall]] = {op: [] for op in OP_NAMES}
    lengths = (129, 1, 150, 0, 65)
    for call in op_calls(dtype, lengths=lengths, heads=4, head_size=24, inner=330):
        calls[call.op].append(call)
    return calls


def assert_same_results(actual: list[Tensor], wanted: list[Tensor], what: str) -> None:
    assert len(actual) == len(wanted)
    for index, (value, right) in enumerate(zip(actual, wanted, strict=True)):
        assert_same_bits(value, right, f"{what}, result {index}")


def test_threads_and_runs_change_no_bit(
    isa: str, dtype: torch.dtype, restore_threads: None
) -> None:
    """Results and parameter gradients: 1, 2 and 3 threads, and once more."""
    for calls in large_calls(dtype).values():
        for call in calls:
            torch.set_num_threads(1)
            wanted = call.run()
            for threads in (2, 3, 1):
                torch.set_num_threads(threads)
                what = f"{call.op} ({call.name}) on {threads} threads"
                assert_same_results(call.run(), wanted, what)


def row_functions(
    hidden: int, inner: int, dtype: torch.dtype
) -> dict[str, Callable[[Tensor], Tensor]]:
    """Functions of rows alone, by the raw ops with random parameters."""
    up, down = randn(inner, hidden, dtype=dtype), randn(hidden, inner, dtype=dtype)
    up_bias, down_bias = randn(inner, dtype=dtype), randn(hidden, dtype=dtype)
    square = randn(hidden, hidden, dtype=dtype)
    position, types = randn(4, hidden, dtype=dtype), randn(1, hidden, dtype=dtype)

    def feed_forward(x: Tensor, activation: str) -> Tensor:
        network = (up, up_bias, down, down_bias)
        return OPS.feed_forward_forward(x, *network, None, None, activation, False)[0]

    def embedding(x: Tensor) -> Tensor:
        places = torch.full((x.shape[0],), 2)
        tables = (None, position, types, down_bias, down_bias)
        return OPS.embedding_forward(None, x, places, None, *tables, 1e-5, 0.0, 0, None)[0]

    def layer_norm(x: Tensor) -> Tensor:
        norm = (down_bias, down_bias, 1e-5, 0.0, 0, None, False)
        return OPS.layer_norm_forward(x, x, *norm)[0]

    def qkv(x: Tensor) -> Tensor:
        return OPS.linear_forward(x, [square] * 3, [down_bias] * 3, None, "none")

    def dx(x: Tensor) -> Tensor:
        return OPS.linear_backward([x], None, [down], None, "none", True, False, False)[0]

    return {
        "linear": lambda x: OPS.linear_forward(x, [up], [up_bias], None, "none"),
        "linear tanh": lambda x: OPS.linear_forward(x, [up], [], None, "tanh"),
        "qkv": qkv,
        "gelu": lambda x: feed_forward(x, "gelu"),
        "gelu_tanh": lambda x: feed_forward(x, "gelu_tanh"),
        "relu": lambda x: feed_forward(x, "relu"),
        "layer_norm": layer_norm,
        "embedding": embedding,
        "dx": dx,
    }


@pytest.mark.parametrize(("hidden", "inner"), [(1, 3), (17, 33), (40, 100), (300, 530)])
def test_a_row_alone_is_the_row_in_any_batch(
    isa: str, dtype: torch.dtype, hidden: int, inner: int
) -> None:
    rows = 140
    x = randn(rows, hidden, dtype=dtype)
    for name, function in row_functions(hidden, inner, dtype).items():
        whole = function(x)
        for row in (0, 1, 5, 6, 11, 63, 64, 127, 139):
            assert_same_bits(function(x[row : row + 1]), whole[row : row + 1], f"{name} {row}")
        for begin, end in [(3, 5), (7, 12), (1, 8), (60, 139), (5, 140)]:
            assert_same_bits(function(x[begin:end]), whole[begin:end], f"{name} {begin}:{end}")
        order = torch.randperm(rows)
        assert_same_bits(function(x[order]), whole[order], f"{name} in another order")


@pytest.mark.parametrize(("heads", "size"), [(2, 8), (3, 40), (2, 64), (1, 128)])
def test_a_sequence_alone_is_the_sequence_in_any_batch(
    isa: str, dtype: torch.dtype, heads: int, size: int
) -> None:
    lengths = [5, 64, 1, 130, 0, 63, 300]
    rows, hidden = sum(lengths), heads * size
    qkv, grad = randn(rows, 3, hidden, dtype=dtype), randn(rows, hidden, dtype=dtype)

    def run(qkv: Tensor, grad: Tensor, lengths: list[int], longest: int) -> list[Tensor]:
        shape = (cumulative(lengths), longest, heads, size**-0.5, 0.0, 0, None)
        query, key, value = qkv.unbind(1)
        out, lse = OPS.attention_forward(query, key, value, *shape)
        dqkv = torch.stack(OPS.attention_backward(grad, query, key, value, out, lse, *shape), 1)
        return [out, lse.t().contiguous(), dqkv]

    whole = run(qkv, grad, lengths, 300)
    parts = list(zip(qkv.split(lengths), grad.split(lengths), strict=True))
    ends = cumulative(lengths).tolist()
    for index, (part, part_grad) in enumerate(parts):
        wanted = [x[ends[index] : ends[index + 1]] for x in whole]
        length = lengths[index]
        assert_same_results(run(part, part_grad, [length], length), wanted, f"length {length}")
        # With a neighbour of another length on either side, and room to spare.
        for before, after in [(3, 5), (1, 6), (6, 0)]:
            chosen = [before, index, after]
            batch = [torch.cat([parts[i][j] for i in chosen]) for j in (0, 1)]
            values = run(*batch, [lengths[i] for i in chosen], 400)  # type: ignore[arg-type]
            begin = lengths[before]
            middle = [x[begin : begin + length] for x in values]
            assert_same_results(middle, wanted, f"length {length} between {before} and {after}")


def answer(connection: Connection, calls: list[OpCall]) -> None:
    connection.send([[x.numpy().tobytes() for x in call.run()] for call in calls])


@linux
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_computes(isa: str, restore_threads: None) -> None:
    """libgomp's threads do not survive a fork: the child must run alone, not wait for them."""
    torch.set_num_threads(2)
    large = large_calls()
    calls = [large[op][0] for op in ("linear_forward", "attention_backward")]
    wanted = [[x.numpy().tobytes() for x in call.run()] for call in calls]
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=answer, args=(there, calls), daemon=True)
    child.start()
    there.close()
    try:
        # A guard against a hang, generous on purpose.
        assert here.poll(120), "the forked child hangs"
        assert here.recv() == wanted
        child.join(120)
        assert child.exitcode == 0
    finally:
        child.kill()
        child.join()
        here.close()
    for call, right in zip(calls, wanted, strict=True):
        assert [x.numpy().tobytes() for x in call.run()] == right, "the parent after the fork"


def test_eight_python_threads_at_once(isa: str, restore_threads: None) -> None:
    torch.set_num_threads(2)
    calls = [calls[0] for calls in large_calls().values()]
    wanted = [call.run() for call in calls]
    barrier = threading.Barrier(8)

    def work(first: int) -> None:
        barrier.wait()
        for i in range(len(calls)):
            call, right = calls[(first + i) % len(calls)], wanted[(first + i) % len(calls)]
            assert_same_results(call.run(), right, f"{call.op} in thread {first}")

    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(work, i) for i in range(8)]:
            future.result()


def test_a_python_thread_of_its_own_follows_set_num_threads(restore_threads: None) -> None:
    """The OpenMP limit is per thread and set late by torch; results must not care."""
    call = large_calls()["linear_backward"][0]
    torch.set_num_threads(1)
    wanted = call.run()
    with ThreadPoolExecutor(1) as pool:
        assert_same_results(pool.submit(call.run).result(), wanted, "a new thread")


def control_word() -> int:
    """MXCSR without its sticky flags: rounding, masks, flush-to-zero, denormals-are-zero."""
    libm = ctypes.CDLL("libm.so.6")
    environment = ctypes.create_string_buffer(64)
    assert libm.fegetenv(environment) == 0
    return int.from_bytes(environment.raw[28:32], "little") & ~0x3F


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64",
    reason="reads MXCSR from fegetenv as glibc on x86-64 lays it out",
)
def test_the_callers_mxcsr_stays(isa: str) -> None:
    calls = [calls[0] for calls in large_calls().values()]
    plain = control_word()
    wanted = [call.run() for call in calls]
    assert control_word() == plain
    if not torch.set_flush_denormal(True):
        pytest.skip("torch cannot set flush-to-zero on this processor")
    try:
        flushing = control_word()
        assert flushing != plain, "the reading of MXCSR sees nothing"
        for call, right in zip(calls, wanted, strict=True):
            for value, exact in zip(call.run(), right, strict=True):
                torch.testing.assert_close(value, exact)
            assert control_word() == flushing, call.op
    finally:
        torch.set_flush_denormal(False)
