"""A library in a process of its own: no library's threads run, or spin, in another's time."""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peers.cases import Batch
from peers.limits import environment
from peers.machine import busy_seconds
from peers.models import Models
from peers.peer import PEERS, AbsentError

# Threads that wait by spinning give up after a while; one that never does is waited for no longer.
_LONGEST_SPIN = 2.0


@dataclass(frozen=True)
class Turn:
    """Attributes:
    seconds: of each call, of the first only if alone: it finds the caches as another library
        left them and threads asleep.
    elsewhere: processor time that went to other processes, as a share of the turn on one
        processor; 0 where the system does not say.
    """

    seconds: list[float]
    elsewhere: float


class Process:
    """One library's process. Requests are answered in turn; an idle one sleeps in a read.

    Raises (every request):
        AbsentError: the library is not there or does not do what is asked, and why.
    """

    def __init__(
        self, name: str, models: Models, threads: int, train: bool, variables: dict[str, str]
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, name, models, threads, train), daemon=True
        )
        with environment({**variables, "OMP_NUM_THREADS": str(threads)}):
            self._process.start()
        theirs.close()

    def loaded(self) -> dict[str, Any]:
        """Versions, settings and the instruction set, once its model is loaded."""
        return self._answer()  # type: ignore[no-any-return]

    def prepare(self, batch: Batch) -> dict[str, NDArray[np.float32]]:
        """Sets the batch that turns are taken on; -> its outputs."""
        return self._ask("prepare", batch)  # type: ignore[no-any-return]

    def turn(self, seconds: float) -> Turn:
        """Calls until ``seconds`` are over."""
        return self._ask("turn", seconds)  # type: ignore[no-any-return]

    def close(self) -> None:
        self._connection.close()
        self._process.join(10)
        self._process.terminate()

    def _ask(self, request: str, argument: object) -> Any:
        try:
            self._connection.send((request, argument))
        except OSError as error:
            raise AbsentError(f"its process has ended: {error}") from error
        return self._answer()

    def _answer(self) -> Any:
        try:
            kind, value = self._connection.recv()
        except EOFError:
            self._process.join()
            raise AbsentError(f"its process ended with code {self._process.exitcode}") from None
        if kind == "absent":
            raise AbsentError(value)
        return value


def write_files(name: str, models: Models) -> None:
    """Has a library's model written, in a process that ends afterwards.

    Raises:
        AbsentError: the library is not there, or the writing failed, and why.
    """
    context = multiprocessing.get_context("spawn")
    connection, theirs = context.Pipe()
    process = context.Process(target=_write, args=(theirs, name, models), daemon=True)
    process.start()
    theirs.close()
    try:
        problem = connection.recv()
    except EOFError:
        problem = "the process that writes its model ended"
    process.join()
    if problem:
        raise AbsentError(problem)


def _write(connection: Connection, name: str, models: Models) -> None:
    try:
        PEERS[name].load().files(models)
        connection.send("")
    except Exception as error:
        connection.send(_told(error))


def _told(error: Exception) -> str:
    if isinstance(error, PackageNotFoundError):
        return f"{error.name} is not installed"
    if isinstance(error, (AbsentError, ImportError)):
        return str(error)
    traceback.print_exception(error)
    return f"{type(error).__name__}: {error}"


def _serve(connection: Connection, name: str, models: Models, threads: int, train: bool) -> None:
    try:
        peer = PEERS[name].load()(models, threads, train)
        connection.send(
            (
                "ok",
                {
                    "versions": peer.versions(),
                    "settings": peer.settings(),
                    "instruction_set": peer.instruction_set(),
                },
            )
        )
        call: Callable[[], Any] = lambda: None  # noqa: E731
        while True:
            request, argument = connection.recv()
            if request == "prepare":
                call = peer.prepare(argument)
                connection.send(("ok", peer.outputs(argument)))
            else:
                turn = _turn(call, argument)
                _wait_until_idle()
                connection.send(("ok", turn))
    except EOFError:
        return
    except Exception as error:
        connection.send(("absent", _told(error)))


def _turn(call: Callable[[], Any], least: float) -> Turn:
    seconds: list[float] = []
    busy, own = busy_seconds(), time.process_time()
    while sum(seconds) < least:
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    elsewhere = busy_seconds() - busy - (time.process_time() - own)
    return Turn(seconds[1:] or seconds, max(0.0, elsewhere) / sum(seconds))


def _wait_until_idle() -> None:
    end = time.perf_counter() + _LONGEST_SPIN
    while time.perf_counter() < end:
        before = time.process_time()
        time.sleep(0.01)
        if time.process_time() - before < 0.001:
            return
