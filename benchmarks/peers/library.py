"""A library under measurement: a process for each way in which it can be set up."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peers.cases import Batch
from peers.limits import is_best, limits
from peers.models import Models
from peers.peer import PEERS, AbsentError
from peers.process import Process, Turn, write_files

# A turn does not count while other processes have more than this share of a processor.
DISTURBED = 0.05


@dataclass(frozen=True)
class Way:
    """One way to set a library up: additions to the environment, and what it then says."""

    environment: Mapping[str, str]
    process: Process
    said: Mapping[str, Any]


class Library:
    """A library whose model is loaded, in one process for each way.

    Raises:
        AbsentError: it cannot be had, or cannot do what is asked; the text says why.
    """

    def __init__(self, name: str, models: Models, isa: str, threads: int, train: bool) -> None:
        peer = PEERS[name].load()
        if train and not peer.trains:
            raise AbsentError("not for training")
        if peer.unlimited and not is_best(isa):
            raise AbsentError(f"its instruction set cannot be limited: {peer.unlimited}")
        write_files(name, models)
        self.precision = peer.precision
        self.computes = models.head if peer.has_classifier else "encoder"
        self.ways: list[Way] = []
        refused = AbsentError("no way")
        for environment in peer.environments(isa):
            process = Process(name, models, threads, train, {**limits(isa), **environment})
            try:
                self.ways.append(Way(environment, process, process.loaded()))
            except AbsentError as error:
                process.close()
                refused = error
        if not self.ways:
            raise refused

    def close(self) -> None:
        for way in self.ways:
            way.process.close()

    def describe(self) -> dict[str, Any]:
        ways = [{"environment": way.environment, **way.said} for way in self.ways]
        return {"precision": self.precision, "computes": self.computes, "ways": ways}

    def prepare(self, batch: Batch) -> list[dict[str, NDArray[np.float32]]]:
        """Sets the batch that turns are taken on; -> the outputs of every way."""
        return [way.process.prepare(batch) for way in self.ways]

    def fastest(self, seconds: float, tries: int) -> int:
        """The way that is best on this batch, by the shortest call of two turns."""
        if len(self.ways) == 1:
            return 0
        shortest = [
            min(min(undisturbed(way.process, seconds, tries).seconds) for _ in range(2))
            for way in self.ways
        ]
        return shortest.index(min(shortest))


def undisturbed(process: Process, seconds: float, tries: int) -> Turn:
    """A turn while nothing else runs on the machine, or the last of some tries."""
    turn = process.turn(seconds)
    for _ in range(tries - 1):
        if turn.elsewhere <= DISTURBED:
            break
        time.sleep(0.2)
        turn = process.turn(seconds)
    return turn
