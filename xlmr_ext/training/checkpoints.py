"""The checkpoints that a run leaves: its best weights in the folder, its last ones below it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from xlmr_ext.checkpoint import open_checkpoint
from xlmr_ext.files import replace_files
from xlmr_ext.saving import LOG_NAME, SaveError, interrupts_wait, replace_checkpoint

if TYPE_CHECKING:
    from xlmr_ext.optim import NarrowVocabulary
    from xlmr_ext.pretrained import PreTrainedModel
    from xlmr_ext.tokenization import XLMRobertaTokenizer
    from xlmr_ext.weights import Pieces

LAST_NAME = "last"


@dataclass
class Checkpoints:
    """Where a run's weights go; without a directory, nowhere.

    ``saved`` says whose weights the directory holds, such as ``epoch 2``; "" where none of this
    run. ``written`` counts what was saved.
    """

    model: PreTrainedModel
    tokenizer: XLMRobertaTokenizer
    directory: Path | None
    narrow: NarrowVocabulary | None
    saved: str = ""
    written: int = 0

    def told(self) -> str:
        """What is saved, a clause for a message."""
        if not self.saved:
            return "nothing was saved"
        return f"{self.directory} holds the weights of {self.saved}"

    def save_best(self, name: str, log: Mapping[str, Any]) -> None:
        """Replaces the checkpoint by the weights that the model has now.

        Raises:
            SaveError: writing failed; what was there is untouched.
        """
        if self.directory is None:
            return
        # So that what Ctrl-C says of the weights that are saved is true.
        with interrupts_wait():
            self._replace(self.directory, name, log)
            self.saved = name
            self.written += 1

    def save_last(self, name: str, log: Mapping[str, Any]) -> None:
        """The same for the folder of the last weights; the best ones stay what they are."""
        if self.directory is None:
            return
        self._replace(self.directory / LAST_NAME, name, log)

    def best_weights(self) -> dict[str, Tensor] | None:
        """What is trained, by name, as :meth:`save_best` wrote it: mapped from its file, so that it
        is not in memory as well. None without a directory."""
        names = [name for name, p in self.model.named_parameters() if p.requires_grad]
        weights = None if self.directory is None else open_checkpoint(self.directory, {}, {})
        if weights is None or not weights.shapes.keys() >= set(names):
            return None
        table = None if self.narrow is None else self._table_name()
        return {
            name: weights.read(name)
            if self.narrow is None or name != table
            else self.narrow.cut(weights.read(name))
            for name in names
        }

    def hand_over_table(self) -> None:
        """Gives a narrow vocabulary the whole table of the best weights, mapped from its file."""
        if self.narrow is None or self.directory is None or self.model.device.type != "cpu":
            return
        self.narrow.adopt(open_checkpoint(self.directory, {}, {}).read(self._table_name()))

    def write_log(self, log: Mapping[str, Any]) -> None:
        """Replaces the log that lies beside the best weights; SaveError where that fails."""
        if self.directory is None:
            return
        try:
            _write_log(self.directory, log)
        except OSError as error:
            raise SaveError(
                f"could not write the log to {self.directory}: {error.strerror}; {self.told()}"
            ) from error

    def _replace(
        self,
        directory: Path,
        name: str,
        log: Mapping[str, Any],
    ) -> None:
        def write(folder: Path) -> None:
            entries: dict[str, Tensor | Pieces] = self.model.state_dict(keep_vars=True)
            if self.narrow is not None:
                entries[self._table_name()] = self.narrow.table()
            self.model.save_pretrained(folder, state_dict=entries)
            self.tokenizer.save_pretrained(folder)
            _write_log(folder, log)

        try:
            replace_checkpoint(directory, write)
        except Exception as error:
            before = (
                f"the weights of {self.saved} are still there"
                if self.saved
                else "what was there before is unchanged"
            )
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise SaveError(f"could not save {name} to {directory}: {reason}; {before}") from error

    def _table_name(self) -> str:
        """The name of the narrow vocabulary's weight in the model."""
        assert self.narrow is not None
        weight = self.narrow.weight
        return next(name for name, p in self.model.named_parameters() if p is weight)


def _write_log(folder: Path, log: Mapping[str, Any]) -> None:
    text = json.dumps(log, indent=1, ensure_ascii=True)
    replace_files(folder, {LOG_NAME: lambda path: path.write_text(text, "utf-8")})
