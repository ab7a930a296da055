"""A Hub on loopback: enough of its HTTP API for the real huggingface_hub client to publish, load and fail against.

No package can take its place: olah (0.5.4) is a mirror for reading, hf-local-hub (3.0.0) starts a program that is not
in it. So this is one, in memory: repositories with commits and branches, regular and LFS uploads, private repositories
behind tokens, collections; and faults on demand.
"""

import base64
import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import yaml

TOKEN = "hf_secretTokenThatNobodyMayPrint"
LFS_SUFFIXES = (".safetensors", ".png")
LICENCES = {"apache-2.0", "mit", "cc0-1.0", "other", "unknown"} | {
    f"cc-by-{terms}4.0" for terms in ("", "sa-", "nc-", "nc-sa-", "nd-", "nc-nd-")
}


@dataclass
class Fault:
    """What goes wrong with the next `times` requests that match.

    kind: "status" (answers with `value`), "cut" (closes half-way), "reset" (resets the connection half-way), "stall"
    (waits `value` seconds half-way), "corrupt" (changes one byte).
    """

    kind: str
    path: str = ""
    method: str = "GET"
    value: float = 0
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Repo:
    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # oid to files
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)


class Hub:
    """State of the server. `log` has (method, path, authorised) of every request."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.lfs_files: set[str] = set()
        self.collections: dict[str, dict] = {}
        self.faults: list[Fault] = []
        self.log: list[tuple[str, str, bool]] = []
        self.url = ""
        self.lock = threading.Lock()

    def requests(self, method: str = "", path: str = "") -> list[str]:
        return [p for m, p, _ in self.log if m.startswith(method) and re.search(path, p)]

    def fail(self, kind: str, path: str = "", **options) -> None:
        self.faults.append(Fault(kind, path, **options))

    def commit(self, repo_id: str, branch: str, files: dict[str, bytes], message: str, private: bool = False) -> str:
        repo = self.repos.setdefault(repo_id, Repo(private))
        parent = repo.branches.get(branch, "")
        digest = hashlib.sha1(f"{repo_id}{parent}{message}{time.monotonic_ns()}".encode())
        for name, content in sorted(files.items()):
            digest.update(name.encode() + hashlib.sha256(content).digest())
        oid = digest.hexdigest()
        repo.commits[oid], repo.branches[branch] = dict(files), oid
        repo.messages.append(message)
        return oid

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        repo = self.repos[repo_id]
        return repo.commits[repo.branches.get(revision, revision)]

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.method == method and fault.times > 0 and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None


@contextmanager
def serve() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def connect(hub: Hub, monkeypatch, home: Path) -> None:
    """Points the Hub client of this process at the server, with an empty cache, no stored token and no waiting."""
    from huggingface_hub import constants

    home.mkdir(parents=True, exist_ok=True)
    for name, value in {
        "ENDPOINT": hub.url,  # the client reads HF_ENDPOINT and the like once, when it is imported
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DOWNLOAD_TIMEOUT": 0.3,
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        self._dispatch("GET")

    def do_HEAD(self) -> None:
        self._dispatch("HEAD")

    def do_POST(self) -> None:
        self._dispatch("POST")

    def do_PUT(self) -> None:
        self._dispatch("PUT")

    # --- routing ---

    ROUTES = (
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/collections", "new_collection"),
        ("GET", r"/api/collections/(.+)", "collection"),
        ("POST", r"/api/collections/(.+)/items", "collect"),
        ("GET", r"/api/models/([^/]+/[^/]+)", "info"),
        ("GET", r"/api/models/([^/]+/[^/]+)/revision/(.+)", "info"),
        ("POST", r"/api/models/([^/]+/[^/]+)/branch/(.+)", "branch"),
        ("POST", r"/api/models/([^/]+/[^/]+)/preupload/(.+)", "preupload"),
        ("POST", r"/api/models/([^/]+/[^/]+)/commit/(.+)", "do_commit"),
        ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/([0-9a-f]{64})", "lfs_put"),
        ("GET", r"/cdn/([0-9a-f]{64})", "cdn"),
        ("GET", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
    )

    def _dispatch(self, method: str) -> None:
        path = unquote(self.path.split("?")[0])
        self.token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.hub.log.append((method, path, bool(self.token)))
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.fault = self.hub.take_fault(method, path)
        if self.fault and self.fault.kind == "status":
            code = int(self.fault.value)
            return self._send(code, {"error": f"fault {code}"}, self.fault.headers)
        if self.token and self.token != TOKEN:
            return self._send(
                401, {"error": "bad token"}, {"X-Error-Message": "Invalid credentials in Authorization header"}
            )
        for verb, pattern, name in self.ROUTES:
            if verb == method.replace("HEAD", "GET") and (match := re.fullmatch(pattern, path)):
                writes = method in ("POST", "PUT") and name not in ("validate", "lfs_put")
                if writes and not self.token:
                    return self._send(401, {"error": "log in"}, {"X-Error-Message": "Invalid username or password."})
                return getattr(self, name)(*match.groups())
        return self._send(404, {"error": path})

    def _send(self, code: int, body: bytes | dict | list = b"", headers: dict[str, str] | None = None) -> None:
        content = json.dumps(body).encode() if isinstance(body, dict | list) else body
        headers = {"Content-Type": "application/json", "Content-Length": str(len(content)), **(headers or {})}
        fault = self.fault if self.command != "HEAD" and self.fault and self.fault.kind != "status" else None
        if fault and fault.kind == "corrupt":
            content = (
                content[: len(content) // 2]
                + bytes([content[len(content) // 2] ^ 1])
                + content[len(content) // 2 + 1 :]
            )
        self.send_response(code)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault and fault.kind in ("cut", "reset", "stall"):
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            if fault.kind == "stall":
                threading.Event().wait(fault.value)  # tests replace time.sleep
            if fault.kind == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
            self.close_connection = True
            return
        self.wfile.write(content)

    # --- repositories ---

    def create(self) -> None:
        data = json.loads(self.body)
        repo_id = f"{data.get('organization') or 'me'}/{data['name']}"
        with self.hub.lock:
            if repo_id in self.hub.repos:
                return self._send(409, {"error": "exists", "url": f"{self.hub.url}/{repo_id}"})
            private = data.get("visibility") == "private" or bool(data.get("private"))
            self.hub.commit(
                repo_id, "main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit", private
            )
        self._send(200, {"url": f"{self.hub.url}/{repo_id}"})

    def _repo(self, repo_id: str) -> Repo | None:
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and not self.token):
            # What the Hub answers to strangers and for what does not exist, so that private names do not leak.
            self._send(
                401 if not self.token else 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
            )
            return None
        return repo

    def info(self, repo_id: str, revision: str = "main") -> None:
        if (repo := self._repo(repo_id)) is None:
            return
        oid = repo.branches.get(revision, revision)
        if oid not in repo.commits:
            return self._send(404, {"error": "rev"}, {"X-Error-Code": "RevisionNotFound"})
        files = [{"rfilename": name} for name in repo.commits[oid]]
        self._send(200, {"id": repo_id, "modelId": repo_id, "sha": oid, "private": repo.private, "siblings": files})

    def branch(self, repo_id: str, name: str) -> None:
        if (repo := self._repo(repo_id)) is None:
            return
        if name in repo.branches:
            return self._send(409, {"error": "exists"})
        repo.branches[name] = repo.branches["main"]
        self._send(200, {})

    def validate(self) -> None:
        """The rules of model card metadata that a card here can break."""
        content = json.loads(self.body)["content"]
        match = re.match(r"---\n(.*?)\n---\n", content, re.S)
        meta = yaml.safe_load(match[1]) if match else None
        errors = []
        if not isinstance(meta, dict):
            errors.append("no metadata")
        else:
            if meta.get("license") not in LICENCES:
                errors.append(f'"license" must be one of the known ones, got {meta.get("license")}')
            if meta.get("license") == "other" and not re.fullmatch(r"[a-z0-9.-]+", str(meta.get("license_name"))):
                errors.append('"license_name" is required with license: other')
            for key in ("tags", "datasets", "metrics"):
                if not all(isinstance(v, str) for v in meta.get(key, [])):
                    errors.append(f'"{key}" must be strings')
            for model in meta.get("model-index", []):
                for result in model["results"]:
                    ok = result.get("task", {}).get("type") and result.get("dataset", {}).get("type")
                    if not ok or not all("type" in m and "value" in m for m in result.get("metrics", [{}])):
                        errors.append("model-index is incomplete")
        body = {"errors": [{"message": m} for m in errors], "warnings": []}
        self._send(400 if errors else 200, body)

    def preupload(self, repo_id: str, revision: str) -> None:
        if (repo := self._repo(repo_id)) is None:
            return
        if revision not in repo.branches:
            return self._send(404, {"error": "rev"}, {"X-Error-Code": "RevisionNotFound"})
        present = repo.commits[repo.branches[revision]]
        answer = []
        for file in json.loads(self.body)["files"]:
            lfs, old = file["path"].endswith(LFS_SUFFIXES), present.get(file["path"])
            oid = None if old is None else hashlib.sha256(old).hexdigest() if lfs else git_hash(old)
            answer.append(
                {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": oid}
            )
        self._send(200, {"files": answer})

    def lfs_batch(self, repo_id: str) -> None:
        objects = []
        for item in json.loads(self.body)["objects"]:
            new = item["oid"] not in self.hub.blobs
            actions = {"actions": {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}} if new else {}
            objects.append({"oid": item["oid"], "size": item["size"], **actions})
        self._send(200, {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"})

    def lfs_put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self._send(422, {"error": "hash"})
        self.hub.blobs[oid] = self.body
        self._send(200)

    def do_commit(self, repo_id: str, revision: str) -> None:
        if (repo := self._repo(repo_id)) is None:
            return
        with self.hub.lock:
            files = dict(repo.commits[repo.branches[revision]])
            lines = [json.loads(line) for line in self.body.splitlines()]
            header = next(line["value"] for line in lines if line["key"] == "header")
            if header.get("parentCommit") not in (None, repo.branches[revision]):
                return self._send(412, {"error": "The branch has moved on"})
            for line in lines:
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    if value["oid"] not in self.hub.blobs:
                        return self._send(400, {"error": f"no such LFS object {value['oid']}"})
                    files[value["path"]] = self.hub.blobs[value["oid"]]
                elif line["key"] == "deletedFile":
                    files.pop(value["path"])
            oid = self.hub.commit(repo_id, revision, files, header["summary"])
        self._send(200, {"commitUrl": f"{self.hub.url}/{repo_id}/commit/{oid}", "commitOid": oid, "hookOutput": ""})

    # --- downloads ---

    def resolve(self, repo_id: str, revision: str, name: str) -> None:
        if (repo := self._repo(repo_id)) is None:
            return
        oid = repo.branches.get(revision, revision)
        if oid not in repo.commits:
            return self._send(404, {"error": "rev"}, {"X-Error-Code": "RevisionNotFound"})
        commit = {"X-Repo-Commit": oid}
        if (content := repo.commits[oid].get(name)) is None:
            return self._send(404, {"error": "entry"}, {"X-Error-Code": "EntryNotFound", **commit})
        if not name.endswith(LFS_SUFFIXES):
            return self._ranged(content, {"ETag": f'"{git_hash(content)}"', **commit})
        sha = hashlib.sha256(content).hexdigest()
        self.hub.blobs[sha] = content
        location = f"{self.hub.url.replace('127.0.0.1', 'localhost')}/cdn/{sha}"  # another host, as on the Hub
        headers = {"Location": location, "X-Linked-Etag": f'"{sha}"', "X-Linked-Size": str(len(content)), **commit}
        self._send(302, b"", headers)

    def cdn(self, sha: str) -> None:
        self._ranged(self.hub.blobs[sha], {"ETag": f'"{sha}"'})

    def _ranged(self, content: bytes, headers: dict[str, str]) -> None:
        headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", **headers}
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(match[1])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            return self._send(206, content[start:], headers)
        self._send(200, content, headers)

    # --- people and collections ---

    def whoami(self) -> None:
        self._send(200 if self.token else 401, {"name": "me", "type": "user", "orgs": []})

    def new_collection(self) -> None:
        data = json.loads(self.body)
        slug = f"{data['namespace']}/{re.sub('[^a-z0-9]+', '-', data['title'].lower())}-0123456789abcdef01234567"
        if slug in self.hub.collections:
            return self._send(409, {"slug": slug, "error": "exists"})
        owner = {"_id": "0", "name": data["namespace"], "type": "org"}
        fixed = {
            "position": 0,
            "private": False,
            "theme": "blue",
            "upvotes": 0,
            "lastUpdated": "2026-01-01T00:00:00.000Z",
        }
        told = {"slug": slug, "title": data["title"], "owner": owner, "description": data.get("description", "")}
        self.hub.collections[slug] = {**told, **fixed, "items": []}
        self._send(200, self.hub.collections[slug])

    def collection(self, slug: str) -> None:
        found = self.hub.collections.get(slug)
        self._send(200 if found else 404, found or {"error": slug})

    def collect(self, slug: str) -> None:
        data, items = json.loads(self.body), self.hub.collections[slug]["items"]
        if any(item["id"] == data["item"]["id"] for item in items):
            return self._send(409, {"error": "exists"})
        items.append(
            {"_id": str(len(items)), **data["item"], "position": len(items), "note": {"text": data.get("note", "")}}
        )
        self._send(200, self.hub.collections[slug])
