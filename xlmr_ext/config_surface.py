"""ConfigSurface: what programs for transformers ask of a configuration, apart from its settings."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xlmr_ext.files import replace_files
from xlmr_ext.refusals import CONFIGURATIONS

if TYPE_CHECKING:
    from typing_extensions import Self

# Settings of transformers' configuration that are facts here.
FIXED: dict[str, Any] = {
    "add_cross_attention": False,
    "chunk_size_feed_forward": 0,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "tie_word_embeddings": True,
    "transformers_version": None,
    "use_cache": False,
}


class ConfigSurface:
    """Further methods of a configuration; the class of it has ``to_dict``, ``validate``, ..."""

    dtype: str | None

    if TYPE_CHECKING:

        def to_dict(self) -> dict[str, Any]: ...
        def to_json_string(self) -> str: ...
        def validate(self) -> None: ...

    @property
    def torch_dtype(self) -> str | None:
        """Older name of ``dtype``."""
        return self.dtype

    @torch_dtype.setter
    def torch_dtype(self, value: str | None) -> None:
        self.dtype = value

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> Self:
        """The configuration itself: it describes text and nothing else."""
        return self

    def update(self, config_dict: Mapping[str, Any]) -> None:
        """Sets several settings.

        Raises:
            TypeError, ValueError: as the constructor.
        """
        for name, value in config_dict.items():
            setattr(self, name, value)
        self.validate()

    def to_diff_dict(self) -> dict[str, Any]:
        """The settings that differ from the defaults, and ``model_type``."""
        default = type(self)().to_dict()
        return {
            name: value
            for name, value in self.to_dict().items()
            if name == "model_type" or name not in default or value != default[name]
        }

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        """Writes the text of ``config.json`` into a file, atomically."""
        path, content = Path(json_file_path), self.to_json_string().encode()
        replace_files(path.parent, {path.name: lambda fresh: fresh.write_bytes(content)})

    def _absent(self, name: str) -> Any:
        """What a name is that is neither a setting nor kept: a fact, or an error."""
        if name in FIXED:
            return FIXED[name]
        why = f": {CONFIGURATIONS[name]}" if name in CONFIGURATIONS else ""
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}{why}")
