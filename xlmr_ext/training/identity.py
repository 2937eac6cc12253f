"""What a run is of: settings, task, data and model, to be compared when it is continued."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from xlmr_ext.mapped_memory import give_back
from xlmr_ext.optim import word_embeddings
from xlmr_ext.weights import Pieces, bytes_of, pieces_of

if TYPE_CHECKING:
    from xlmr_ext.pretrained import PreTrainedModel
    from xlmr_ext.tasks.base import Features, Task
    from xlmr_ext.training.settings import Settings


class HasPlaces(Protocol):
    """Data that says where a part of it is from."""

    def where(self, example: int, /) -> str: ...


class ResumeError(ValueError):
    """A run cannot be continued: it is another one, or its state is damaged."""


@dataclass(frozen=True)
class Identity:
    """A run's settings by name, its model, and a digest of every example.

    Args:
        settings: of :class:`Settings`, and the task, its labels and whether the vocabulary is cut.
        model: a checksum of what training does not change, and the shapes of the rest.
        unit: what ``train`` and ``dev`` have a digest of each.
    """

    settings: Mapping[str, Any]
    model: str
    train: NDArray[np.int64]
    dev: NDArray[np.int64]
    unit: str = "examples"

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        task: Task,
        settings: Settings,
        train: Features,
        dev: Features | None,
        *,
        is_narrow: bool,
    ) -> Identity:
        """Of a run that has not begun: sequences have their own ids, the model its own table."""
        own = {"task": task.name, "labels": list(task.labels), "narrow_vocabulary": is_narrow}
        none = np.empty(0, np.int64)
        return cls(
            # As JSON gives them back.
            {
                name: list(value) if isinstance(value, tuple) else value
                for name, value in {**asdict(settings), **own}.items()
            },
            fingerprint(model, is_narrow),
            _digests(train),
            none if dev is None else _digests(dev),
        )

    def as_row(self) -> dict[str, Any]:
        """For JSON, the data in short."""
        return {
            "settings": dict(self.settings),
            "model": self.model,
            "train": _short(self.train),
            "dev": _short(self.dev),
        }

    def check(
        self,
        before: Mapping[str, Any],
        where: str,
        digests: Mapping[str, NDArray[np.int64]] | None = None,
        features: Mapping[str, HasPlaces | None] | None = None,
    ) -> None:
        """ResumeError that shows what differs from another run.

        Args:
            before: that run's :meth:`as_row`.
            where: what the message calls it.
            digests: its ``train`` and ``dev``, where they are known, and ``features`` those of now:
                the message names the first example that differs.
        """
        then = before["settings"]
        names = [*then, *(name for name in self.settings if name not in then)]
        differ = [
            f"{name} {_shown(then, name)} (now {_shown(self.settings, name)})"
            for name in names
            if _shown(then, name) != _shown(self.settings, name)
        ]
        if differ:
            raise ResumeError(
                f"{where} had other settings: {', '.join(differ)}; give the same, or train anew "
                "without resume"
            )
        for name, now in (("train", self.train), ("dev", self.dev)):
            if before[name] != _short(now):
                what = f"{name} had {before[name]['examples']} {self.unit}, now {len(now)}"
                if before[name]["examples"] == len(now):
                    what = f"{name} has as many {self.unit}, and others among them"
                    known = (features or {}).get(name)
                    if digests is not None and known is not None:
                        first = int(np.flatnonzero(digests[name] != now)[0])
                        what = f"{name} differs at {known.where(first)}"
                raise ResumeError(
                    f"{where} had other data: {what}; give the same, or train anew without resume"
                )
        if before["model"] != self.model:
            raise ResumeError(
                f"{where} started from another model: load the same once more, or train anew "
                "without resume"
            )


def _shown(settings: Mapping[str, Any], name: str) -> str:
    return repr(settings[name]) if name in settings else "absent"


def _short(digests: NDArray[np.int64]) -> dict[str, Any]:
    return {"examples": len(digests), "checksum": zlib.crc32(digests.tobytes())}


def _digests(features: Features) -> NDArray[np.int64]:
    found = np.empty(len(features), np.int64)
    for example, target in enumerate(features.targets):
        digest = blake2b(repr(target).encode(), digest_size=8)
        for row in features.rows([example]):
            # Its length first, so that two rows are not one.
            ids = features.sequences[row]
            digest.update(np.asarray([len(ids), *ids], dtype=np.int64).tobytes())
        found[example] = int.from_bytes(digest.digest(), "little", signed=True)
    return found


def fingerprint(model: PreTrainedModel, is_narrow: bool) -> str:
    """A checksum of names, shapes and types, and of the values that no saved state holds."""
    checksum = 0
    table = word_embeddings(model).weight if is_narrow else None
    for name, parameter in model.named_parameters():
        about = f"{name} {list(parameter.shape)} {parameter.dtype} {parameter.requires_grad}"
        checksum = zlib.crc32(about.encode(), checksum)
        # Of a cut vocabulary, the rows that the data does not use.
        if parameter is table or not parameter.requires_grad:
            checksum = checksum_of(parameter, checksum)
    return f"{checksum:08x}"


def checksum_of(tensor: torch.Tensor | Pieces, before: int = 0) -> int:
    """The CRC-32 of a tensor's bytes behind those of ``before``."""
    checksum = before
    for part in pieces_of(tensor):
        checksum = zlib.crc32(memoryview(bytes_of(part)), checksum)  # type: ignore[arg-type, unused-ignore]
        give_back(part)
    return checksum
