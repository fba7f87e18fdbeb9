from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from kellm_features.artifacts import sha256_file
from kellm_features.errors import EngineError
from kellm_features.knowledge.modelfiles import hash_model, hub_folder, model_files

COMMIT = "8f14e45fceea167a5a36dedd4bea2543deadbeef"
OTHER = "c9f0f895fb98ab9159f51fd0297e236ddeadbeef"
MODEL = {"config.json": b'{"model_type": "bert"}', "model.safetensors": b"weights", "tokenizer.json": b"{}"}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of a hub that must not be asked."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def lay_out(cache: Path, files: dict[str, bytes], commit: str = COMMIT, repo: str = "org/tiny") -> Path:
    """A snapshot as huggingface_hub leaves it: blobs by hash, links to them by name, the branch's commit."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    for name, content in files.items():
        blob = folder / "blobs" / hashlib.sha256(content).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        link = folder / "snapshots" / commit / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text(commit)
    return folder / "snapshots" / commit


def test_a_cached_model_is_found_offline_by_branch_and_by_commit(cache: Path) -> None:
    older = lay_out(cache, MODEL | {"config.json": b"{}"}, OTHER)
    newer = lay_out(cache, MODEL, COMMIT)
    assert hub_folder("org/tiny", None, "encode.model") == newer
    assert hub_folder("org/tiny", "main", "encode.model") == newer
    assert hub_folder("org/tiny", OTHER, "encode.model") == older
    assert newer.name == COMMIT
    # What the stage hashes are the bytes behind the links.
    assert {name: sha256_file(path) for name, path in model_files(newer).items()} == {
        name: hashlib.sha256(content).hexdigest() for name, content in MODEL.items()
    }
    assert hash_model(newer) != hash_model(older)


def test_torch_weights_do_where_there_are_no_safetensors(cache: Path) -> None:
    folder = lay_out(cache, {"config.json": b"{}", "pytorch_model.bin": b"weights"}, repo="bert-tiny")
    assert hub_folder("bert-tiny", None, "encode.model") == folder


@pytest.mark.parametrize("files", [{}, {"config.json": b"{}", "tokenizer.json": b"{}"}, {"model.safetensors": b"w"}])
def test_missing_and_partial_models_are_told_with_setting_value_and_remedy(cache: Path, files) -> None:
    if files:
        lay_out(cache, files)
    with pytest.raises(
        EngineError, match=r"'generate.model' is 'org/tiny'.*hf download org/tiny --revision main "
    ) as told:
        hub_folder("org/tiny", "main", "generate.model")
    assert "\n" not in str(told.value)


def test_offline_mode_is_named_as_the_reason(cache: Path) -> None:
    with pytest.raises(EngineError, match="HF_HUB_OFFLINE forbids it"):
        hub_folder("org/tiny", None, "encode.model")


def test_an_impossible_id_is_told(cache: Path) -> None:
    with pytest.raises(EngineError, match=r"'encode.model' is 'a/b/c'"):
        hub_folder("a/b/c", None, "encode.model")


class Hub(ThreadingHTTPServer):
    """The few answers of a hub that a download needs; it remembers what it was asked."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.files = files
        self.asked: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Answers(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(send=True)

    def do_HEAD(self) -> None:
        self._answer(send=False)

    def _answer(self, send: bool) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append(f"{self.command} {path}")
        status, headers, body = 200, {"X-Repo-Commit": COMMIT}, b""
        if path in ("/api/models/org/tiny", "/api/models/org/tiny/revision/main"):
            body = json.dumps({"id": "org/tiny", "sha": COMMIT}).encode()
        elif path == f"/api/models/org/tiny/tree/{COMMIT}":
            rows = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in self.server.files.items()
            ]
            body = json.dumps(rows).encode()
        elif path.startswith(f"/org/tiny/resolve/{COMMIT}/"):
            body = self.server.files[path.removeprefix(f"/org/tiny/resolve/{COMMIT}/")]
            headers["ETag"] = f'"{hashlib.sha1(body).hexdigest()}"'
        else:
            status, headers = 404, {"X-Error-Code": "RepoNotFound"}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if send:
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    copies = {"pytorch_model.bin": b"the same", "tf_model.h5": b"the same", "onnx/model.onnx": b"the same"}
    with Hub(MODEL | copies | {"1_Pooling/config.json": b"{}"}) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.address)
        template = f"{server.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield server
        server.shutdown()


def test_a_model_is_downloaded_once_and_without_copies_of_its_weights(hub: Hub) -> None:
    folder = hub_folder("org/tiny", None, "encode.model")
    assert folder.name == COMMIT
    assert {n: p.read_bytes() for n, p in model_files(folder).items()} == MODEL | {"1_Pooling/config.json": b"{}"}
    assert not any("pytorch_model" in asked or ".h5" in asked or "onnx" in asked for asked in hub.asked)
    hub.asked.clear()
    assert hub_folder("org/tiny", None, "encode.model") == folder
    assert hub.asked == []


def test_an_interrupted_download_is_completed(hub: Hub) -> None:
    folder = hub_folder("org/tiny", None, "encode.model")
    (folder / "tokenizer.json").unlink()
    assert (hub_folder("org/tiny", None, "encode.model") / "tokenizer.json").read_bytes() == b"{}"


def test_a_model_that_the_hub_lacks_is_told(hub: Hub) -> None:
    with pytest.raises(EngineError, match=r"'encode.model' is 'org/none'.*the hub has no such model"):
        hub_folder("org/none", None, "encode.model")
