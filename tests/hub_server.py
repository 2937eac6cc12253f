"""A small hub on the loopback: enough of its protocol for files of models, and ways to fail.

``python hub_server.py`` is the other side: a process that loads what it is told on standard input
and says what came of it, with the hub's addresses and cache from its environment.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".bin", ".model")


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repository:
    """Revisions by name, each a commit; the files of every commit."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    revisions: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    etags: dict[str, str] = field(default_factory=dict)  # instead of the content's hash
    # What the client gets of a file's body: (whole body, times asked before) -> part, then cut.
    bodies: dict[str, Callable[[bytes, int], bytes]] = field(default_factory=dict)
    lengths: dict[str, int] = field(default_factory=dict)  # announced instead of the true one
    delay: float = 0.0

    def push(self, files: dict[str, bytes], revision: str = "main") -> str:
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits[commit] = files
        self.revisions[revision] = commit
        return commit


class Hub:
    """The server, in a thread. ``log`` holds "METHOD path" of every request, in order."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.log: list[str] = []
        self._asked: dict[str, int] = {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, request: BaseHTTPRequestHandler, *, body: bool) -> None:
        path = unquote(urlsplit(request.path).path)
        self.log.append(f"{request.command} {path}")
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self._listing(request, "/".join(parts[2:4]), parts[4:])
        elif len(parts) > 4 and parts[2] == "resolve":
            self._file(request, "/".join(parts[:2]), parts[3], "/".join(parts[4:]), body)
        else:
            refuse(request, 404, "")

    def _commit(self, request: BaseHTTPRequestHandler, name: str, revision: str) -> str | None:
        repository = self.repositories.get(name)
        if repository is None:
            # The real one does not tell strangers what is private from what is not there.
            refuse(request, 401, "RepoNotFound", "Invalid username or password.")
            return None
        authorized = request.headers.get("Authorization") == "Bearer key"
        if repository.gated and not authorized:
            refuse(request, 401, "GatedRepo", f"Access to model {name} is restricted.")
            return None
        commit = repository.revisions.get(revision, revision)
        if commit not in repository.commits:
            refuse(request, 404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        time.sleep(repository.delay)
        return commit

    def _file(
        self, request: BaseHTTPRequestHandler, name: str, revision: str, file: str, body: bool
    ) -> None:
        commit = self._commit(request, name, revision)
        if commit is None:
            return
        repository = self.repositories[name]
        content = repository.commits[commit].get(file)
        if content is None:
            refuse(request, 404, "EntryNotFound", "Entry not found", commit)
            return
        large = file.endswith(LARGE)
        etag = hashlib.sha256(content).hexdigest() if large else git_hash(content)
        etag = repository.etags.get(file, etag)
        start = 0
        asked = request.headers.get("Range", "")
        if body and asked.startswith("bytes="):
            start = int(asked.removeprefix("bytes=").split("-")[0])
        length = repository.lengths.get(file, len(content))
        request.send_response(206 if start else 200)
        request.send_header("X-Repo-Commit", commit)
        request.send_header("ETag", f'"{etag}"')
        request.send_header("Accept-Ranges", "bytes")
        request.send_header("Content-Length", str(length - start))
        if start:
            request.send_header("Content-Range", f"bytes {start}-{length - 1}/{length}")
        request.end_headers()
        if not body:
            return
        part = content[start:]
        change = repository.bodies.get(file)
        if change is not None:
            key = f"{name}/{file}"
            part = change(part, self._asked.get(key, 0))
            self._asked[key] = self._asked.get(key, 0) + 1
        request.wfile.write(part)
        if len(part) != length - start:
            request.close_connection = True

    def _listing(self, request: BaseHTTPRequestHandler, name: str, rest: list[str]) -> None:
        commit = self._commit(request, name, rest[1] if len(rest) > 1 else "main")
        if commit is None:
            return
        entries = [
            {"type": "file", "path": path, "size": len(content), "oid": git_hash(content)}
            for path, content in self.repositories[name].commits[commit].items()
        ]
        text = json.dumps(entries).encode()
        request.send_response(200)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(text)))
        request.end_headers()
        request.wfile.write(text)


def refuse(
    request: BaseHTTPRequestHandler, status: int, code: str, message: str = "", commit: str = ""
) -> None:
    request.send_response(status)
    if code:
        request.send_header("X-Error-Code", code)
    if message:
        request.send_header("X-Error-Message", message)
    if commit:
        request.send_header("X-Repo-Commit", commit)
    request.send_header("Content-Length", "0")
    request.end_headers()


# --- the process that loads -------------------------------------------------------------------


class Loader:
    """A process with a cache of its own that loads from the hub at an address."""

    def __init__(self, address: str, home: Path, **environment: str) -> None:
        unset = ("HF_", "HUGGING", "HTTP_", "HTTPS_", "ALL_PROXY", "TRANSFORMERS")
        inherited = {k: v for k, v in os.environ.items() if not k.upper().startswith(unset)}
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **inherited,
                "HF_ENDPOINT": address,
                "HF_HOME": str(home),
                "HF_HUB_DISABLE_XET": "1",
                "HF_HUB_DISABLE_PROGRESS_BARS": "1",
                "HF_HUB_DISABLE_TELEMETRY": "1",
                "NO_PROXY": "127.0.0.1,localhost",
                # A proxy that is not there: the loopback must not be asked for through it.
                "HTTP_PROXY": "http://127.0.0.1:9",
                **environment,
            },
        )

    def __call__(self, kind: str, name: str, **arguments: Any) -> dict[str, Any]:
        """Loads a "model", "config" or "tokenizer"; what it is, or the error's kind and text."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([kind, name, arguments]) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def close(self) -> None:
        self._process.communicate(timeout=20)


def _load(kind: str, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    if kind == "config":
        from xlmr_ext.configuration import XLMRobertaConfig

        return XLMRobertaConfig.from_pretrained(name, **arguments).to_dict()
    if kind == "tokenizer":
        from xlmr_ext.tokenization import XLMRobertaTokenizer

        tokenizer = XLMRobertaTokenizer.from_pretrained(name, **arguments)
        return {"ids": tokenizer("The quick brown fox")["input_ids"]}
    from small_models import Classifier

    model = Classifier.from_pretrained(name, **arguments)
    total = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        total.update(key.encode() + tensor.numpy().tobytes())
    return {"digest": total.hexdigest(), "labels": list(model.config.id2label.values())}


def _serve() -> None:
    for line in sys.stdin:
        kind, name, arguments = json.loads(line)
        try:
            answer = _load(kind, name, arguments)
        except Exception as error:
            answer = {
                "error": next(
                    k.__name__
                    for k in (OSError, ValueError, TypeError, Exception)
                    if isinstance(error, k)
                ),
                "kind": type(error).__name__,
                "text": str(error),
            }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve()
