"""The command ``xlmr-ext``: a module a command, and what they share.

What takes time to import (torch, the model) is imported by the commands that need it, so that
``--help`` and usage errors answer at once.
"""

from __future__ import annotations

from xlmr_ext.cli.main import main

__all__ = ["main"]
