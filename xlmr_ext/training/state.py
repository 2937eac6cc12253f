"""The state of a run on the disk, from which it goes on bit for bit: one file, whole or absent.

It holds tensors (weights, moments of the optimiser, best weights, torch's generators, a digest of
every example) and JSON (how far the run is, the other generators), each with a checksum.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from xlmr_ext.files import replace_files
from xlmr_ext.formats.weights_file import open_safetensors
from xlmr_ext.saving import SaveError, interrupts_wait
from xlmr_ext.training.identity import HasPlaces, Identity, ResumeError, checksum_of
from xlmr_ext.weights import bytes_of, tensors_to_save, write_weights

STATE_NAME = "xlmr_ext_training_state.safetensors"

_VERSION = 1  # of what the facts and tensors mean
_JSON, _CHECKSUM = "json", "json.checksum"


class StateFile:
    """The file in a run's directory."""

    def __init__(self, directory: Path, identity: Identity) -> None:
        self._directory = directory
        self._path = directory / STATE_NAME
        self.identity = identity
        self._saved = 0  # the step of the latest one

    def save(self, step: int, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Replaces the state by that of now, generators included.

        Args:
            facts: JSON.
            tensors: names may have any prefix but ``json``, ``generator`` and ``digests``.

        Raises:
            SaveError: writing failed; the state before is untouched.
        """
        entries = tensors_to_save({**tensors, **_generator_tensors(), **self._digests()})
        content = {
            "version": _VERSION,
            "facts": {**facts, "step": step},
            "identity": self.identity.as_row(),
            "generators": _generators(),
            "checksums": {name: checksum_of(entry) for name, entry in entries.items()},
        }
        text = json.dumps(content).encode()
        entries[_JSON] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        entries[_CHECKSUM] = torch.tensor([zlib.crc32(text)])
        with interrupts_wait():
            try:
                replace_files(
                    self._directory, {STATE_NAME: lambda path: write_weights(entries, path)}
                )
            except OSError as error:
                kept = (
                    f"that of step {self._saved} is still there"
                    if self._saved
                    else ("what was there before is unchanged")
                )
                raise SaveError(
                    f"could not save the state of training after step {step} to "
                    f"{self._directory}: {error.strerror}; {kept}"
                ) from error
        self._saved = step

    def load(
        self, train: HasPlaces, dev: HasPlaces | None
    ) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """Facts and tensors of a state of this run; None without a file.

        The facts have the states of the generators, for :func:`set_generators`.

        Raises:
            ResumeError: the state is damaged, or another run's; the file is untouched.
        """
        if not self._path.exists():
            return None
        content, tensors = self._read()
        if content["version"] != _VERSION:
            raise ResumeError(
                f"{self._path} was written by another version of xlmr_ext: go on with that one, or "
                "train anew without resume"
            )
        self.identity.check(
            content["identity"],
            f"the run in {self._directory}",
            {name: tensors.pop(f"digests.{name}").numpy() for name in ("train", "dev")},
            {"train": train, "dev": dev},
        )
        facts: dict[str, Any] = {**content["facts"], "generators": content["generators"]}
        self._saved = facts["step"]
        return facts, tensors

    def remove(self) -> None:
        """The run is over."""
        self._path.unlink(missing_ok=True)

    def _read(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        try:
            handle = open_safetensors(self._path)
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
            text = bytes_of(tensors.pop(_JSON)).tobytes()
            if int(tensors.pop(_CHECKSUM)) != zlib.crc32(text):
                raise ValueError(f"its entry {_JSON} has another checksum")
            content = json.loads(text)
            if content["checksums"].keys() != tensors.keys():
                raise ValueError("it has other entries than it says")
            for name, checksum in content["checksums"].items():
                if checksum_of(tensors[name]) != checksum:
                    raise ValueError(f"its entry {name} has another checksum")
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise ResumeError(
                f"{self._path} is damaged ({error}), so the run cannot go on from it; nothing was "
                "changed: restore the file, or train anew without resume"
            ) from error
        return content, tensors

    def _digests(self) -> dict[str, Tensor]:
        return {
            "digests.train": torch.from_numpy(self.identity.train),
            "digests.dev": torch.from_numpy(self.identity.dev),
        }


def _generators() -> dict[str, Any]:
    """The states of Python's and numpy's global generators."""
    kind, keys, *rest = np.random.get_state()
    return {"python": random.getstate(), "numpy": [kind, np.asarray(keys).tolist(), *rest]}


def _generator_tensors() -> dict[str, Tensor]:
    """Those of torch: dropout draws its seeds from the CPU's."""
    states = {"generator.cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        for number, state in enumerate(torch.cuda.get_rng_state_all()):
            states[f"generator.cuda.{number}"] = state
    return states


def set_generators(states: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
    """Sets the global generators as they were; takes theirs out of the tensors."""
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(tensors.pop("generator.cpu"))
    for name in [name for name in tensors if name.startswith("generator.cuda.")]:
        torch.cuda.set_rng_state(tensors.pop(name), int(name.rpartition(".")[2]))
