"""The checkpoints that a run leaves: its best weights in the folder, its last ones below it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xlmr_ext.files import replace_files
from xlmr_ext.saving import LOG_NAME, SaveError, interrupts_wait, replace_checkpoint

if TYPE_CHECKING:
    from xlmr_ext.optim import NarrowVocabulary
    from xlmr_ext.pretrained import PreTrainedModel
    from xlmr_ext.tokenization import XLMRobertaTokenizer

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
            whole = nullcontext() if self.narrow is None else self.narrow.made_whole()
            self._replace(self.directory, name, log, whole)
            self.saved = name
            self.written += 1

    def save_last(self, name: str, log: Mapping[str, Any]) -> None:
        """The same for the folder of the last weights; the best ones stay what they are."""
        if self.directory is None:
            return
        whole = nullcontext() if self.narrow is None else self.narrow.lent_whole()
        self._replace(self.directory / LAST_NAME, name, log, whole)

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
        whole: AbstractContextManager[None],
    ) -> None:
        def write(folder: Path) -> None:
            self.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            _write_log(folder, log)

        try:
            with whole:
                replace_checkpoint(directory, write)
        except Exception as error:
            before = (
                f"the weights of {self.saved} are still there"
                if self.saved
                else "what was there before is unchanged"
            )
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise SaveError(f"could not save {name} to {directory}: {reason}; {before}") from error


def _write_log(folder: Path, log: Mapping[str, Any]) -> None:
    text = json.dumps(log, indent=1, ensure_ascii=True)
    replace_files(folder, {LOG_NAME: lambda path: path.write_text(text, "utf-8")})
