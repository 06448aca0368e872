"""A Hugging Face Hub on the loopback, for the real client: repositories, commits, LFS, downloads, and faults on demand.

It speaks what `huggingface_hub` 0.25 to 2.4 sends for creating, pushing, tagging and loading a model, without Xet, and
keeps everything in memory. It is a model of that contract and no more: the real Hub may do otherwise.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import itertools
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

TOKEN = "hf_loopback"
USER = "tester"


@dataclass
class Commit:
    """One state of a repository: its files, by path."""

    sha: str
    title: str
    files: dict[str, bytes]
    parent: str | None = None


@dataclass
class Repo:
    """A repository: its commits, and the branches and tags that name them."""

    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def resolve(self, revision: str) -> Commit | None:
        return self.commits.get(self.branches.get(revision) or self.tags.get(revision) or revision)

    def commit(self, branch: str, title: str, files: dict[str, bytes]) -> Commit:
        parent = self.branches.get(branch)
        sha = hashlib.sha1(f"{len(self.commits)} {title} {sorted(files)}".encode()).hexdigest()
        self.commits[sha] = Commit(sha, title, files, parent)
        self.branches[branch] = sha
        return self.commits[sha]


@dataclass
class Fault:
    """What goes wrong, with requests of one method whose path a pattern is found in.

    Attributes:
        status: Answer with this status and nothing else.
        cut: Send this many bytes of the body, then close the connection.
        tamper: Changes the body of the answer; headers are those of the true one.
        call: Is called before the request is answered as usual.
        skip: Number of requests that are let through first.
        times: Number of requests it happens to.
    """

    method: str
    pattern: str
    status: int = 0
    cut: int = -1
    tamper: Callable[[bytes], bytes] | None = None
    call: Callable[[], Any] | None = None
    skip: int = 0
    times: int = 1_000

    def strikes(self, method: str, path: str) -> bool:
        if method != self.method or not re.search(self.pattern, path):
            return False
        self.skip -= 1
        if self.skip >= 0 or self.times == 0:
            return False
        self.times -= 1
        return True


class Hub(ThreadingHTTPServer):
    """The server and all it knows.

    Attributes:
        repos: The repositories, by name.
        objects: The LFS objects, by their sha256.
        log: Method and path of every request.
        faults: What is to go wrong.
        lfs_from: Size from which files go by LFS.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.log: list[tuple[str, str]] = []
        self.faults: list[Fault] = []
        self.lfs_from = 10_000
        self.default_private = False
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def fault(self, method: str, pattern: str, **what: Any) -> Fault:
        self.faults.append(Fault(method, pattern, **what))
        return self.faults[-1]

    def create(self, name: str, private: bool = False) -> Repo:
        self.repos[name] = Repo(private)
        self.repos[name].commit("main", "initial commit", {".gitattributes": b""})
        return self.repos[name]

    def requests(self, method: str, pattern: str) -> list[str]:
        return [path for verb, path in self.log if verb == method and re.search(pattern, path)]


class Refused(Exception):
    """An answer that is no success."""

    def __init__(self, status: int, code: str = "", body: Any = None) -> None:
        super().__init__(status)
        self.status, self.code, self.body = status, code, body


@dataclass
class Answer:
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    status: int = 200


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self) -> None:
        hub, path = self.server, unquote(urlsplit(self.path).path)
        body = self._body()
        with hub.lock:
            hub.log.append((self.command, self.path))
            fault = next((fault for fault in hub.faults if fault.strikes(self.command, path)), Fault("", ""))
        if fault.call is not None:
            fault.call()
        with hub.lock:
            try:
                answer = Answer(status=fault.status) if fault.status else self._route(path, body)
            except Refused as refused:
                headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.code} if refused.code else {}
                answer = Answer(_json(refused.body or {"error": refused.code}), headers, refused.status)
        if fault.tamper is not None:
            answer.body = fault.tamper(answer.body)
        self._send(answer, fault.cut)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, answer: Answer, cut: int) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            if "Content-Length" not in answer.headers:
                self.send_header("Content-Length", str(len(answer.body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer.body if cut < 0 else answer.body[:cut])
            if cut >= 0:
                self.close_connection = True

    def _route(self, path: str, body: bytes) -> Answer:
        for method, pattern, handle in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                return handle(self, *match.groups(), body=body)
        raise Refused(404)

    @property
    def _user(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token != TOKEN:
            raise Refused(401, "", {"error": "Invalid credentials in Authorization header"})
        return USER if token else None

    def _repo(self, name: str) -> Repo:
        repo = self.server.repos.get(name)
        if repo is None or (repo.private and self._user is None):
            raise Refused(404, "RepoNotFound")
        return repo

    def _writable(self, name: str) -> Repo:
        if self._user is None:
            raise Refused(401, "RepoNotFound")
        return self._repo(name)

    def _commit(self, repo: Repo, revision: str) -> Commit:
        commit = repo.resolve(revision)
        if commit is None:
            raise Refused(404, "RevisionNotFound")
        return commit

    # Each of the methods below answers one request of the client.

    def whoami(self, *, body: bytes) -> Answer:
        if self._user is None:
            raise Refused(401)
        return Answer(_json({"name": USER, "type": "user", "orgs": []}))

    def create(self, *, body: bytes) -> Answer:
        asked = json.loads(body)
        if self._user is None:
            raise Refused(401)
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        url = {"url": f"{self.server.url}/{name}", "name": name, "id": name}
        if name in self.server.repos:
            raise Refused(409, "", url)
        private = asked.get("visibility") == "private" if asked.get("visibility") else asked.get("private")
        self.server.create(name, self.server.default_private if private is None else private)
        return Answer(_json(url))

    def validate(self, *, body: bytes) -> Answer:
        json.loads(body)["content"]
        return Answer(_json({"errors": [], "warnings": []}))

    def preupload(self, name: str, revision: str, *, body: bytes) -> Answer:
        held = self._commit(self._writable(name), revision).files
        answers = []
        for file in json.loads(body)["files"]:
            lfs = file["size"] >= self.server.lfs_from
            old = held.get(file["path"])
            oid = None if old is None else _sha256(old) if lfs else _git_oid(old)
            mode = "lfs" if lfs else "regular"
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return Answer(_json({"files": answers}))

    def batch(self, name: str, *, body: bytes) -> Answer:
        self._writable(name)
        objects = []
        for asked in json.loads(body)["objects"]:
            oid = asked["oid"]
            actions = {"upload": f"{self.server.url}/lfs/{oid}", "verify": f"{self.server.url}/verify"}
            known = oid in self.server.objects
            objects.append({**asked, **({} if known else {"actions": {k: {"href": v} for k, v in actions.items()}})})
        return Answer(_json({"transfer": "basic", "objects": objects}))

    def put(self, oid: str, *, body: bytes) -> Answer:
        if _sha256(body) != oid:
            raise Refused(400)
        self.server.objects[oid] = body
        return Answer()

    def verify(self, *, body: bytes) -> Answer:
        asked = json.loads(body)
        if len(self.server.objects.get(asked["oid"], b"")) != asked["size"]:
            raise Refused(400)
        return Answer(b"{}")

    def commit(self, name: str, revision: str, *, body: bytes) -> Answer:
        repo = self._writable(name)
        lines = [json.loads(line) for line in body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        parent = self._commit(repo, revision)
        if revision not in repo.branches:
            raise Refused(404, "RevisionNotFound")
        if header.get("parentCommit") not in (None, parent.sha):
            raise Refused(412)
        files = dict(parent.files)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        commit = repo.commit(revision, header["summary"], files)
        url = f"{self.server.url}/{name}/commit/{commit.sha}"
        return Answer(_json({"success": True, "commitOid": commit.sha, "commitUrl": url}))

    def info(self, name: str, revision: str | None, *, body: bytes) -> Answer:
        repo = self._repo(name)
        commit = self._commit(repo, revision or "main")
        siblings = [{"rfilename": path, "size": len(data)} for path, data in commit.files.items()]
        data = {"id": name, "modelId": name, "sha": commit.sha, "private": repo.private, "tags": []}
        return Answer(_json({**data, "siblings": siblings}))

    def tree(self, name: str, revision: str, *, body: bytes) -> Answer:
        files = self._commit(self._repo(name), revision).files
        items = [{"type": "file", "path": p, "size": len(d), "oid": _git_oid(d)} for p, d in files.items()]
        return Answer(_json(items))

    def refs(self, name: str, *, body: bytes) -> Answer:
        repo = self._repo(name)
        kinds = {"branches": ("heads", repo.branches), "tags": ("tags", repo.tags)}
        data = {
            kind: [{"name": n, "ref": f"refs/{folder}/{n}", "targetCommit": sha} for n, sha in named.items()]
            for kind, (folder, named) in kinds.items()
        }
        return Answer(_json({**data, "converts": []}))

    def tag(self, name: str, revision: str, *, body: bytes) -> Answer:
        repo, tag = self._writable(name), json.loads(body)["tag"]
        if tag in repo.tags:
            raise Refused(409)
        repo.tags[tag] = self._commit(repo, revision).sha
        return Answer()

    def branch(self, name: str, branch: str, *, body: bytes) -> Answer:
        repo = self._writable(name)
        if branch in repo.branches:
            raise Refused(409)
        start = json.loads(body or b"{}").get("startingPoint") or "main"
        repo.branches[branch] = self._commit(repo, start).sha
        return Answer()

    def untag(self, name: str, tag: str, *, body: bytes) -> Answer:
        if self._writable(name).tags.pop(tag, None) is None:
            raise Refused(404, "RevisionNotFound")
        return Answer()

    def history(self, name: str, revision: str, *, body: bytes) -> Answer:
        repo, commits = self._repo(name), []
        commit: Commit | None = self._commit(repo, revision)
        while commit is not None:
            told = {"id": commit.sha, "title": commit.title, "message": "", "authors": [{"user": USER}]}
            commits.append({**told, "date": "2024-01-01T00:00:00.000Z"})
            commit = repo.commits.get(commit.parent or "")
        return Answer(_json(commits))

    def file(self, name: str, revision: str, path: str, *, body: bytes) -> Answer:
        commit = self._commit(self._repo(name), revision)
        headers = {"X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes"}
        data = commit.files.get(path)
        if data is None:
            raise Refused(404, "EntryNotFound")
        headers["ETag"] = f'"{_git_oid(data)}"'
        if len(data) >= self.server.lfs_from:
            headers |= {"X-Linked-Etag": f'"{_sha256(data)}"', "X-Linked-Size": str(len(data))}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked and self.command == "GET":
            first, last = int(asked[1]), int(asked[2] or len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            return Answer(data[first : last + 1], headers, 206)
        return Answer(data, {**headers, "Content-Length": str(len(data))})


_NAME = "([^/]+/[^/]+)"
_API = f"/api/models/{_NAME}"
# Methods, path and who answers, the first that fits.
ROUTES: list[tuple[tuple[str, ...], str, Callable[..., Answer]]] = [
    (("GET",), "/api/whoami-v2", Handler.whoami),
    (("POST",), "/api/repos/create", Handler.create),
    (("POST",), "/api/validate-yaml", Handler.validate),
    (("POST",), f"{_API}/preupload/(.+)", Handler.preupload),
    (("POST",), f"{_API}/commit/(.+)", Handler.commit),
    (("GET",), f"{_API}/revision/(.+)", Handler.info),
    (("GET",), f"{_API}/tree/(.+)", Handler.tree),
    (("GET",), f"{_API}/refs", Handler.refs),
    (("GET",), f"{_API}/commits/(.+)", Handler.history),
    (("POST",), f"{_API}/tag/(.+)", Handler.tag),
    (("DELETE",), f"{_API}/tag/(.+)", Handler.untag),
    (("POST",), f"{_API}/branch/(.+)", Handler.branch),
    (("GET",), f"{_API}()", lambda self, name, _, body: self.info(name, None, body=body)),
    (("POST",), f"/{_NAME}.git/info/lfs/objects/batch", Handler.batch),
    (("PUT",), "/lfs/([0-9a-f]{64})", Handler.put),
    (("POST",), "/verify", Handler.verify),
    (("HEAD", "GET"), f"/{_NAME}/resolve/([^/]+)/(.+)", Handler.file),
]


def _json(data: Any) -> bytes:
    return json.dumps(data).encode()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    """A Hub that runs until the block ends."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


_caches = itertools.count()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub that the client of this process talks to, with a token and an empty cache."""
    with serving() as server:
        point_to(server, tmp_path, monkeypatch)
        yield server


def point_to(server: Hub, tmp_path: Any, monkeypatch: Any) -> None:
    """Let the client of this process talk to a Hub. It reads these constants whenever it needs them."""
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    fresh_cache(tmp_path, monkeypatch)


def fresh_cache(tmp_path: Any, monkeypatch: Any) -> None:
    """Forget every download, as on another machine."""
    cache = str(tmp_path / f"cache{next(_caches)}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", cache)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SHARED_BLOBS", True, raising=False)
