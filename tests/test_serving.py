"""One model and many callers: Python threads, forked children, thread counts, memory."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import make_classifier, pack, random_ids
from torch import Tensor

from xlmr_ext import _C, PackedBatch, XLMRobertaForSequenceClassification, _native
from xlmr_ext.threads import available_cpus

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc or forks: Linux only")
LENGTHS = ((9, 1, 17, 4, 33), (5,), (1,), (30, 30), (38,) * 6)


def batches() -> list[PackedBatch]:
    return [pack([random_ids(length) for length in lengths]) for lengths in LENGTHS]


def crowd(work: Callable[[int], None], callers: int = 8) -> None:
    """``work(caller)`` in as many Python threads at once."""
    with ThreadPoolExecutor(callers) as pool:
        for future in [pool.submit(work, caller) for caller in range(callers)]:
            future.result()


def frozen(weights: str = "float32") -> XLMRobertaForSequenceClassification:
    return make_classifier().optimize_for_inference(weights)


@pytest.fixture
def capacity() -> Iterator[Callable[[int], None]]:
    """Sets the processors that calls share; the test ends with the right number."""
    yield _C.set_cpu_capacity
    _C.set_cpu_capacity(available_cpus())


@pytest.mark.parametrize("weights", ["float32", "int8"])
@pytest.mark.parametrize("cpus", [1, 2, 16])
def test_eight_callers_get_the_bits_of_one(
    isa: str, cpus: int, weights: str, capacity: Callable[[int], None], restore_threads: None
) -> None:
    model = frozen(weights)
    inputs = batches()
    torch.set_num_threads(1)
    wanted = [model(packed=batch).logits for batch in inputs]
    # With 16 processors the teams have 8, 4 and 2 threads, as many as the callers leave.
    torch.set_num_threads(8 if cpus == 16 else 2)
    capacity(cpus)

    def work(caller: int) -> None:
        with torch.inference_mode():
            for turn in range(10):
                i = (caller + turn) % len(inputs)
                assert torch.equal(model(packed=inputs[i]).logits, wanted[i])

    crowd(work)


def test_gradients_from_several_threads(restore_threads: None) -> None:
    torch.set_num_threads(2)
    model = make_classifier().train()  # without dropout
    parameters = list(model.parameters())
    inputs = batches()

    def gradients(batch: PackedBatch) -> tuple[Tensor, ...]:
        labels = torch.arange(batch.cu_seqlens.numel() - 1) % 3
        loss = model(packed=batch, labels=labels).loss
        return torch.autograd.grad(loss, parameters, allow_unused=True)

    wanted = [gradients(batch) for batch in inputs]

    def work(caller: int) -> None:
        for turn in range(5):
            i = (caller + turn) % len(inputs)
            for ours, right in zip(gradients(inputs[i]), wanted[i], strict=True):
                assert ours is right is None or torch.equal(ours, right)

    crowd(work)


def record_threads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of threads of every call of the frozen encoder from now on."""
    seen: list[int] = []
    native = _C.encoder_forward

    def spy(*arguments: Any) -> int:
        seen.append(arguments[-3])
        return native(*arguments)

    monkeypatch.setattr(_C, "encoder_forward", spy)
    return seen


def test_set_num_threads_is_followed_from_any_thread(
    monkeypatch: pytest.MonkeyPatch, restore_threads: None
) -> None:
    seen = record_threads(monkeypatch)
    model, (batch, *_) = frozen(), batches()
    for threads in (1, 3, 2):
        torch.set_num_threads(threads)
        with ThreadPoolExecutor(1) as other:
            seen.clear()
            other.submit(model, packed=batch).result()
            assert set(seen) == {threads}
            # Within a thread torch follows what was set there last; so do calls from there.
            other.submit(torch.set_num_threads, threads + 1).result()
            seen.clear()
            other.submit(model, packed=batch).result()
            assert set(seen) == {threads + 1}


def test_a_quota_limits_the_calls_and_not_torch(
    monkeypatch: pytest.MonkeyPatch, restore_threads: None
) -> None:
    class Quota:
        def __call__(self, torch_threads: int) -> int:
            return min(torch_threads, 2)

    seen = record_threads(monkeypatch)
    monkeypatch.setattr(_native, "call_threads", Quota())
    torch.set_num_threads(5)
    model, (batch, *_) = frozen(), batches()
    seen.clear()
    wanted = model(packed=batch).logits
    assert set(seen) == {2}
    assert torch.get_num_threads() == 5
    torch.set_num_threads(1)
    assert torch.equal(model(packed=batch).logits, wanted)


FORKING = """
import os, signal, sys, threading
import torch
sys.path.insert(0, {tests!r})
from pairs import make_classifier, random_ids

torch.set_num_threads(2)
model = make_classifier(hidden_size=96, intermediate_size=384).optimize_for_inference()
ids = torch.stack([random_ids(38) for _ in range(16)])
with torch.inference_mode():
    wanted = model(ids).logits
    stop = False

    def call():
        with torch.inference_mode():
            while not stop:
                model(ids)

    callers = [threading.Thread(target=call) for _ in range(3)]
    for caller in callers:
        caller.start()
    codes = []
    for _ in range(10):
        child = os.fork()
        if child == 0:
            signal.alarm(60)  # a child that hangs is killed
            os._exit(0 if torch.equal(model(ids).logits, wanted) else 1)
        codes.append(os.waitpid(child, 0)[1])
    stop = True
    for caller in callers:
        caller.join()
    assert torch.equal(model(ids).logits, wanted)
    print(codes)
"""


@linux
def test_children_forked_while_other_threads_are_inside_a_call() -> None:
    program = FORKING.format(tests=str(Path(__file__).parent))
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str([0] * 10), result.stderr


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@linux
@pytest.mark.parametrize("callers", [1, 4])
def test_ten_thousand_calls_do_not_grow_memory(
    callers: int, capacity: Callable[[int], None], restore_threads: None
) -> None:
    torch.set_num_threads(2)
    capacity(2)
    model, inputs = frozen(), batches()
    refused = dataclasses.replace(inputs[0], max_seqlen=3)

    def calls(count: int) -> None:
        def work(_: int) -> None:
            with torch.inference_mode():
                for turn in range(count // callers):
                    if turn % 10 == 0:
                        with pytest.raises(ValueError, match="expected at most 3"):
                            model(packed=refused)
                    model(packed=inputs[turn % len(inputs)])

        crowd(work, callers)

    calls(2000)
    before = resident_bytes()
    calls(10_000)
    grown = resident_bytes() - before
    assert grown < 2 << 20, f"{grown} bytes more after 10,000 calls"
