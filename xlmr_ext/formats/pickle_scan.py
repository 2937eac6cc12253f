"""What the pickle of a torch file names and announces, found out by a machine that does nothing.

``torch.load(weights_only=True)`` runs no code, yet what it calls may take any amount of memory
(``bytearray(10**12)``, or text encoded again and again), and a storage is read as long as the
pickle says, not as its part of the archive is. Both are settled here before torch reads a byte.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Callable, Collection
from typing import IO, Any, ClassVar

__all__ = ["NotDataError", "StorageCheck", "scan_pickle"]

# Whatever is called is bounded by what it is given, tensors on the meta device included.
_DATA = re.compile(
    r"""collections\.(OrderedDict|Counter)
    | builtins\.(set|complex)
    | torch\.(Size|device|bool|[a-z]+[0-9]+\w*)
    | torch\.[A-Z][A-Za-z0-9]*Storage
    | torch\.serialization\._get_layout
    | torch\._utils\._rebuild_(
        tensor|tensor_v2|parameter|parameter_with_state|sparse_tensor|meta_tensor_no_storage
      )""",
    re.VERBOSE,
)
_ITEM_BYTES = {
    "ComplexDoubleStorage": 16,
    "ComplexFloatStorage": 8,
    "DoubleStorage": 8,
    "LongStorage": 8,
    "FloatStorage": 4,
    "IntStorage": 4,
    "BFloat16Storage": 2,
    "HalfStorage": 2,
    "ShortStorage": 2,
    "BoolStorage": 1,
    "ByteStorage": 1,
    "CharStorage": 1,
}

# Called with a storage's key and the bytes that the pickle announces for it.
StorageCheck = Callable[[str, int], None]


class NotDataError(Exception):
    """The pickle names what is not data; the argument is the name."""


class _Inert(dict[Any, Any]):
    """Stands for a class or function, and for what it makes; takes everything and does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def __hash__(self) -> int:  # type: ignore[override]  # a key of dicts and sets, as the real ones
        return id(self)


class _Scanner(pickle._Unpickler):
    """Python's own machine (C's allocates what a forged memo index asks for)."""

    # It makes an array as long as announced before it reads one.
    dispatch: ClassVar[dict[int, Any]] = {
        code: step
        for code, step in pickle._Unpickler.dispatch.items()
        if code != pickle.BYTEARRAY8[0]
    }

    def __init__(
        self, file: IO[bytes], allowed: Collection[str], check: StorageCheck | None
    ) -> None:
        super().__init__(file, encoding="utf-8")
        self._allowed = allowed
        self._check = check

    def find_class(self, module: str, name: str) -> Any:
        # torch.save writes the names of Python 2.
        full = f"{'builtins' if module == '__builtin__' else module}.{name}"
        if full not in self._allowed and not _DATA.fullmatch(full):
            raise NotDataError(full[:200])
        return type(name, (_Inert,), {})

    def persistent_load(self, pid: Any) -> Any:
        _, storage, key, _, count, *_ = pid
        if self._check is not None:
            if not isinstance(count, int) or not isinstance(key, str):
                raise ValueError("a storage has no key or no size")
            self._check(key, count * _ITEM_BYTES.get(storage.__name__, 1))
        return _Inert()


def scan_pickle(
    source: IO[bytes] | bytes, allowed: Collection[str] = (), check: StorageCheck | None = None
) -> None:
    """Reads one pickle, and makes nothing of it.

    Args:
        source: a pickle, or a file at the beginning of one; it is left behind its end.
        allowed: full names of classes that may be named beside tensors and containers.
        check: called for every storage that is announced; raises to refuse.

    Raises:
        NotDataError: it names something else.
        Exception: of any kind; it is damaged.
    """
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    _Scanner(file, allowed, check).load()
