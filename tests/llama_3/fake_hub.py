"""A small Hugging Face Hub on this machine: what the library asks for, and what goes wrong on the way."""

import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SECRET = "hf_thisTokenMustNeverBeShown"


@dataclass
class Hub:
    """Files of repositories, and what the hub does with requests for them."""

    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    cut: int = 0
    """So many of the next downloads of weights end in the middle."""
    status: int = 0
    """Answer files with this instead."""
    asked: list[str] = field(default_factory=list)
    """METHOD path [range] of each request for a model."""

    def fetched(self) -> list[str]:
        return [
            request.split("/resolve/")[1].split("/", 1)[1] for request in self.asked if request.startswith("GET /o")
        ]


def make_handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

        def refuse(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", f"{code} for {SECRET}")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def answer(self, body: bytes, headers: dict[str, str], status: int = 200) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            if hub.cut and len(body) > 1000:
                hub.cut -= 1
                self.wfile.write(body[: len(body) // 2])
                self.close_connection = True
            else:
                self.wfile.write(body)

        def do_GET(self) -> None:
            path = unquote(self.path.partition("?")[0])
            if "/org/" not in path:
                return self.refuse(404, "NoSuchThing")
            hub.asked.append(f"{self.command} {path} {self.headers.get('Range', '')}".strip())
            found = re.fullmatch(r"(?:/api/models)?/(org/[^/]+)(?:/(revision|resolve)/([^/]+))?(?:/(.*))?", path)
            assert found is not None, path
            repo, kind, revision, file = found.groups()
            if repo not in hub.repos:
                return self.refuse(401, "RepoNotFound")
            if revision not in (None, "main", "v2", COMMIT):
                return self.refuse(404, "RevisionNotFound")
            files = hub.repos[repo]
            if kind != "resolve":
                siblings = [{"rfilename": name, "size": len(body)} for name, body in files.items()]
                body = json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode()
                return self.answer(body, {"Content-Type": "application/json"})
            if repo in hub.gated:
                return self.refuse(403, "GatedRepo")
            if hub.status:
                return self.refuse(hub.status, "Broken")
            if file not in files:
                return self.refuse(404, "EntryNotFound")
            whole = files[file]
            headers = {"ETag": f'"{hashlib.sha256(whole).hexdigest()}"', "X-Repo-Commit": COMMIT}
            if wanted := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
                start = int(wanted[1])
                headers["Content-Range"] = f"bytes {start}-{len(whole) - 1}/{len(whole)}"
                return self.answer(whole[start:], headers, 206)
            return self.answer(whole, headers)

        do_HEAD = do_GET

    return Handler


@contextmanager
def serve_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub at 127.0.0.1, and nothing else that could be reached; cache and working folder are in `tmp_path`."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), make_handler(hub))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    connect = socket.socket.connect

    def only_here(self: socket.socket, address: Any) -> None:
        assert address[0] in ("127.0.0.1", "::1", "localhost"), f"a test reached for {address}"
        connect(self, address)

    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(socket.socket, "connect", only_here)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    if hasattr(constants, "AGENT_HARNESSES_PATH"):
        monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", str(tmp_path / "harnesses.json"))
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.chdir(tmp_path)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
