"""A Hugging Face Hub in memory, on 127.0.0.1, that the real client of huggingface_hub makes whole round trips against.

It holds model repositories with branches, commits and pull request refs, stores regular files and Git LFS objects, and
answers with the statuses, headers and JSON bodies of the Hub. Of what the Hub does it leaves out Xet, tags, pages of
listings, ``.gitignore`` rules and every repository type but models.

    with LoopbackHub() as hub:
        subprocess.run([sys.executable, "push.py"], env=hub.environment(tmp_path), check=True)
        assert hub.files("tester/model")["config.json"] == ...
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote

import yaml

USER = "tester"
WRITE_TOKEN = "hf_write"
READ_TOKEN = "hf_read"

# The Hub starts every repository with a commit that holds this file.
GITATTRIBUTES = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}
_FRONT_MATTER = re.compile(r"\s*---[ \t]*\r?\n(.*?\n)??---[ \t]*\r?(?:\n|\Z)", re.DOTALL)
_UNAUTHENTICATED = "Invalid username or password."


@dataclass(frozen=True)
class StoredFile:
    """A file of a commit: its bytes, and whether git holds them or a Git LFS pointer to them."""

    data: bytes
    is_lfs: bool

    @cached_property
    def sha256(self) -> str:
        """The oid of the LFS object."""
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def git_blob(self) -> bytes:
        """What git holds."""
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n"
        return pointer.encode() if self.is_lfs else self.data

    @cached_property
    def git_oid(self) -> str:
        """The oid of the blob in git."""
        return hashlib.sha1(b"blob %d\0" % len(self.git_blob) + self.git_blob).hexdigest()

    @property
    def etag(self) -> str:
        """The name of the content, by which the client knows that its own file or its cache is up to date."""
        return self.sha256 if self.is_lfs else self.git_oid


@dataclass(frozen=True)
class Commit:
    """A commit with the whole tree at it; the date is in the Hub's form."""

    oid: str
    parent: str | None
    title: str
    message: str
    date: str
    files: Mapping[str, StoredFile]


@dataclass
class _Repo:
    repo_id: str
    private: bool
    gated: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def at(self, revision: str) -> Commit:
        """The commit of a branch, a full ref or an oid."""
        oid = self.branches.get(revision.removeprefix("refs/heads/"), revision)
        if oid not in self.commits:
            raise _Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[oid]

    def add(self, branch: str, parent: str | None, title: str, message: str, files: Mapping[str, StoredFile]) -> Commit:
        """A new commit, which the branch then points to."""
        oid = hashlib.sha1(f"{self.repo_id} {len(self.commits)} {title}".encode()).hexdigest()
        date = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        self.commits[oid] = commit = Commit(oid, parent, title, message, date, files)
        self.branches[branch] = oid
        return commit

    def history(self, revision: str) -> list[Commit]:
        """The commits up to the revision, newest first."""
        found = [self.at(revision)]
        while parent := found[-1].parent:
            found.append(self.commits[parent])
        return found


@dataclass(frozen=True)
class _Reply:
    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


class _Refusal(Exception):
    """An error, told as the Hub tells it: in two headers and in the body."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: Mapping[str, str] | None = None):
        super().__init__(message)
        headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}
        self.reply = _json({"error": message}, status, headers)


class _Request(BaseHTTPRequestHandler):
    """A request, read to its end so that the connection can be kept, and the writing of its reply."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: LoopbackHub
    query: dict[str, list[str]]
    body: bytes
    token: str | None

    def handle(self) -> None:
        """Answer until the client leaves; that it dies or is cut off is no error here."""
        with contextlib.suppress(ConnectionError):
            super().handle()

    def serve(self) -> None:
        """Answer one request of any method."""
        self.path, _, query = self.path.partition("?")
        self.query = parse_qs(query, keep_blank_values=True)
        self.token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        pieces = []
        for piece in self._pieces():
            if self.command == "PUT" and not self.hub._survives(len(piece)):
                self.hub.requests.append((self.command, self.path, 0))
                # With no time to linger, closing sends RST, and what the client still sends is never read.
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.close_connection = True
                return
            pieces.append(piece)
        self.body = b"".join(pieces)
        self._write(self.hub._answer(self))

    do_GET = do_HEAD = do_POST = do_PUT = serve

    def json(self) -> dict[str, Any]:
        """The body as JSON."""
        return json.loads(self.body)

    def _pieces(self) -> Iterator[bytes]:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            yield from self._read(int(self.headers.get("Content-Length", 0)))
            return
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            yield from self._read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass  # trailers

    def _read(self, size: int) -> Iterator[bytes]:
        while size:
            piece = self.rfile.read1(min(size, 2**16))
            if not piece:
                raise ConnectionAbortedError("the client left in the middle of a body")
            size -= len(piece)
            yield piece

    def _write(self, reply: _Reply) -> None:
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(reply.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body)

    def log_message(self, *_: Any) -> None:
        """Nothing: the log is ``LoopbackHub.requests``."""


class LoopbackHub:
    """A hub of one user, who has a write token and a read-only one.

    A file goes to LFS when its name ends in ``.safetensors`` or it has ``lfs_bytes`` or more, and is uploaded in parts
    of ``part_bytes`` when it has more than that. Repositories of other users can be added and read, not written;
    private ones among them are not seen.

    Attributes:
        requests: Method, path without query and status of every request; status 0 where the connection was cut.
        received_lfs: The oids (sha256) of the LFS objects that arrived whole, in order.
    """

    def __init__(self, *, lfs_bytes: int = 10_000, part_bytes: int = 1_000_000, user: str = USER) -> None:
        self.user = user
        self.requests: list[tuple[str, str, int]] = []
        self.received_lfs: list[str] = []
        self._lfs_bytes = lfs_bytes
        self._part_bytes = part_bytes
        self._repos: dict[str, _Repo] = {}
        self._objects: dict[str, bytes] = {}
        self._awaited: dict[str, dict[int, bytes]] = {}  # the parts that are here, by the oid of the whole
        self._cuts: list[int] = []
        self._failures = (0, 0, "")
        self._lock = threading.RLock()

    def __enter__(self) -> LoopbackHub:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Request", (_Request,), {"hub": self}))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def endpoint(self) -> str:
        """The value for ``HF_ENDPOINT``."""
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def _storage(self) -> str:
        # As on the Hub, objects lie on another host. The client follows redirects within a host by itself, and would
        # then miss the headers that only the first reply has.
        return f"http://localhost:{self._server.server_port}/lfs"

    def environment(self, home: Path, token: str | None = WRITE_TOKEN) -> dict[str, str]:
        """The whole environment of a client process, which reads its settings when huggingface_hub is imported.

        Args:
            home: A folder for its cache and configuration; nothing of the user's own is seen.
            token: Its token, None for an anonymous client.
        """
        foreign = ("HF_", "HUGGING", "TRANSFORMERS_OFFLINE")
        return {name: value for name, value in os.environ.items() if not name.startswith(foreign)} | {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home / "huggingface"),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": token or "",
            "no_proxy": "127.0.0.1,localhost",
        }

    # What a test arranges and looks at

    def add_repo(self, repo_id: str, files: Mapping[str, bytes], private: bool = False, gated: bool = False) -> Commit:
        """A repository whose first commit holds ``files`` beside ``GITATTRIBUTES``.

        The files of a gated one are open to its owner's write token alone.
        """
        files = GITATTRIBUTES | dict(files)
        stored = {path: StoredFile(data, self._is_lfs(path, len(data))) for path, data in files.items()}
        with self._lock:
            self._repos[repo_id] = repo = _Repo(repo_id, private, gated)
            self._objects |= {file.sha256: file.data for file in stored.values() if file.is_lfs}
            return repo.add("main", None, "initial commit", "", stored)

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """The files at a revision, ``.gitattributes`` among them."""
        return {path: file.data for path, file in self._repos[repo_id].at(revision).files.items()}

    def commits(self, repo_id: str, revision: str = "main") -> list[Commit]:
        """The commits up to a revision, newest first."""
        return self._repos[repo_id].history(revision)

    def cut_after(self, num_bytes: int, times: int = 1) -> None:
        """Close the connection, without a reply, after so many more bytes of LFS uploads, and forget that upload.

        The client sends again what was cut, up to 5 times, so one cut fails nothing: ``times`` cuts follow each other,
        each ``num_bytes`` after the last. ``times=0`` takes back those that are left.
        """
        with self._lock:
            self._cuts = [num_bytes] * times

    def fail_next(self, count: int, status: int, path: str = "") -> None:
        """Answer the next ``count`` requests that have ``path`` in theirs with ``status``, and do nothing else."""
        with self._lock:
            self._failures = (count, status, path)

    # From a request to its reply

    def _survives(self, num_bytes: int) -> bool:
        """Count bytes of an upload; whether its connection lives on."""
        with self._lock:
            if self._cuts:
                self._cuts[0] -= num_bytes
                if self._cuts[0] <= 0:
                    self._cuts.pop(0)
                    return False
            return True

    def _answer(self, request: _Request) -> _Reply:
        with self._lock:
            try:
                reply = self._dispatch(request)
            except _Refusal as refusal:
                reply = refusal.reply
            self.requests.append((request.command, request.path, reply.status))
            return reply

    def _dispatch(self, request: _Request) -> _Reply:
        count, status, path = self._failures
        if count and path in request.path:
            self._failures = (count - 1, status, path)
            raise _Refusal(status, "This failure was asked for.")
        if request.token not in (None, WRITE_TOKEN, READ_TOKEN):
            raise _Refusal(401, "Invalid credentials in Authorization header")
        for method, pattern, route in _ROUTES:
            match = pattern.fullmatch(request.path)
            if match and method == request.command.replace("HEAD", "GET"):
                named = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
                return route(self, request, **named)
        raise _Refusal(404, f"There is no {request.command} {request.path}.")

    def _repo(self, request: _Request, repo_id: str, *, write: bool = False) -> _Repo:
        repo = self._repos.get(repo_id)
        # Over https the client takes a 401 without a code for a missing repository; over http it needs the code.
        if request.token is None and (write or repo is None or repo.private):
            raise _Refusal(401, _UNAUTHENTICATED, "RepoNotFound")
        if repo is None or (repo.private and not repo_id.startswith(f"{self.user}/")):
            raise _Refusal(404, "Repository not found", "RepoNotFound")
        if write and not self._owns(request, repo_id):
            raise _Refusal(403, f"You don't have the rights to write the model {repo_id}.")
        return repo

    def _owns(self, request: _Request, repo_id: str) -> bool:
        return request.token == WRITE_TOKEN and repo_id.startswith(f"{self.user}/")

    def _is_lfs(self, path: str, size: int) -> bool:
        return size >= self._lfs_bytes or (size > 0 and path.endswith(".safetensors"))

    # The routes: accounts, repositories, cards

    def _whoami(self, request: _Request) -> _Reply:
        if request.token is None:
            raise _Refusal(401, _UNAUTHENTICATED)
        token = {"displayName": "test", "role": "write" if request.token == WRITE_TOKEN else "read"}
        auth = {"type": "access_token", "accessToken": token}
        return _json({"type": "user", "name": self.user, "fullname": self.user, "orgs": [], "auth": auth})

    def _create_repo(self, request: _Request) -> _Reply:
        payload = request.json()
        repo_id = f"{payload.get('organization') or self.user}/{payload['name']}"
        if request.token is None:
            raise _Refusal(401, _UNAUTHENTICATED)
        if not self._owns(request, repo_id):
            raise _Refusal(403, f"You don't have the rights to create the model {repo_id}.")
        url = {"url": f"{self.endpoint}/{repo_id}"}
        if repo_id in self._repos:
            return _json({"error": "You already created this model repo", **url}, 409)
        self.add_repo(repo_id, {}, private=payload.get("visibility") == "private")
        return _json(url)

    def _validate_yaml(self, request: _Request) -> _Reply:
        metadata, errors = _read_card(request.json()["content"])
        warnings = [] if metadata or errors else ["empty or missing yaml metadata in repo card"]
        texts = {"errors": errors, "warnings": warnings}
        payload = {kind: [{"message": text} for text in found] for kind, found in texts.items()}
        return _json(payload, 400 if errors else 200)

    # The routes: uploads

    def _preupload(self, request: _Request, repo_id: str, revision: str) -> _Reply:
        present = self._repo(request, repo_id, write=True).at(revision).files
        files = []
        for path, size in ((file["path"], file["size"]) for file in request.json()["files"]):
            mode = "lfs" if self._is_lfs(path, size) else "regular"
            known = {"oid": present[path].etag} if path in present else {}
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **known})
        return _json({"files": files})

    def _lfs_batch(self, request: _Request, repo_id: str) -> _Reply:
        self._repo(request, repo_id, write=True)
        objects = request.json()["objects"]
        for wanted in objects:
            if wanted["oid"] not in self._objects:
                wanted["actions"] = self._upload_actions(repo_id, wanted["oid"], wanted["size"])
        return _json({"transfer": "basic", "objects": objects})

    def _upload_actions(self, repo_id: str, oid: str, size: int) -> dict[str, Any]:
        self._awaited[oid] = {}
        upload: dict[str, Any] = {"href": f"{self._storage}/{oid}"}
        if size > self._part_bytes:
            numbers = range(1, -(-size // self._part_bytes) + 1)
            urls = {str(number): f"{self._storage}/{oid}/{number}" for number in numbers}
            header = {"chunk_size": str(self._part_bytes), **urls}
            upload = {"href": f"{self.endpoint}/api/complete_multipart", "header": header}
        return {"upload": upload, "verify": {"href": f"{self.endpoint}/{repo_id}.git/info/lfs/objects/verify"}}

    def _put_object(self, request: _Request, oid: str, number: str | None = None) -> _Reply:
        if number is None:
            self._store(oid, request.body)
        else:
            self._awaited[oid][int(number)] = request.body
        return _Reply(headers={"ETag": f'"{hashlib.md5(request.body).hexdigest()}"'})

    def _complete_multipart(self, request: _Request) -> _Reply:
        payload = request.json()
        parts = self._awaited[payload["oid"]]
        self._store(payload["oid"], b"".join(parts[part["partNumber"]] for part in payload["parts"]))
        return _json({"success": True})

    def _store(self, oid: str, data: bytes) -> None:
        if hashlib.sha256(data).hexdigest() != oid:
            raise _Refusal(400, f"The SHA-256 of the object is not its oid {oid}.")
        self._objects[oid] = data
        self.received_lfs.append(oid)

    def _verify_object(self, request: _Request, repo_id: str) -> _Reply:
        self._repo(request, repo_id, write=True)
        payload = request.json()
        if len(self._objects.get(payload["oid"], b"")) != payload["size"]:
            raise _Refusal(404, f"The object {payload['oid']} is not here with that size.")
        return _json({"success": True})

    def _commit(self, request: _Request, repo_id: str, revision: str) -> _Reply:
        repo = self._repo(request, repo_id, write=True)
        base = repo.at(revision)
        (_, header), *operations = ((line["key"], line["value"]) for line in map(json.loads, request.body.splitlines()))
        if not base.oid.startswith(header.get("parentCommit", "")):
            raise _Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(base.files)
        for key, value in operations:
            self._apply(files, key, value)
        branch, pull_request = revision, {}
        if "create_pr" in request.query:
            number = 1 + sum(name.startswith("refs/pr/") for name in repo.branches)
            branch = f"refs/pr/{number}"
            pull_request = {"pullRequestUrl": f"{self.endpoint}/{repo_id}/discussions/{number}"}
        elif branch not in repo.branches:
            raise _Refusal(400, f"{revision} is not a branch.")
        oid = repo.add(branch, base.oid, header["summary"], header["description"], files).oid
        url = f"{self.endpoint}/{repo_id}/commit/{oid}"
        return _json({"success": True, "commitOid": oid, "commitUrl": url, **pull_request})

    def _apply(self, files: dict[str, StoredFile], key: str, value: dict[str, Any]) -> None:
        path = value["path"]
        if key == "file":
            files[path] = StoredFile(base64.b64decode(value["content"]), is_lfs=False)
        elif key == "lfsFile":
            if value["oid"] not in self._objects:
                raise _Refusal(400, f"Your push was rejected: {path} points to an LFS object that does not exist.")
            files[path] = StoredFile(self._objects[value["oid"]], is_lfs=True)
        else:
            below = path.rstrip("/") + "/"
            gone = [name for name in files if (name.startswith(below) if key == "deletedFolder" else name == path)]
            if not gone:
                raise _Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
            for name in gone:
                del files[name]

    def _create_branch(self, request: _Request, repo_id: str, branch: str) -> _Reply:
        repo = self._repo(request, repo_id, write=True)
        if branch in repo.branches:
            raise _Refusal(409, f"The branch {branch} already exists.")
        repo.branches[branch] = repo.at(request.json().get("startingPoint", "main")).oid
        return _json({})

    # The routes: listings and downloads

    def _model_info(self, request: _Request, repo_id: str, revision: str = "main") -> _Reply:
        repo = self._repo(request, repo_id)
        commit = repo.at(revision)
        card, _ = _read_card(commit.files["README.md"].data.decode()) if "README.md" in commit.files else ({}, [])
        entries = _entries(commit.files) if "blobs" in request.query else {}
        info = {
            "id": repo_id,
            "author": repo_id.split("/")[0],
            "sha": commit.oid,
            "lastModified": commit.date,
            "private": repo.private,
            "gated": "manual" if repo.gated else False,
            "tags": card.get("tags", []),
            "cardData": card,
            "siblings": [{"rfilename": path, **entries.get(path, {})} for path in sorted(commit.files)],
        }
        return _json(info)

    def _tree(self, request: _Request, repo_id: str, revision: str, folder: str = "") -> _Reply:
        entries = _entries(self._repo(request, repo_id).at(revision).files)
        prefix = f"{folder}/" if folder else ""
        below = [path for path in sorted(entries) if path.startswith(prefix)]
        if folder and not below:
            raise _Refusal(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        if request.query.get("recursive") != ["true"]:
            below = [path for path in below if "/" not in path.removeprefix(prefix)]
        return _json([entries[path] for path in below])

    def _paths_info(self, request: _Request, repo_id: str, revision: str) -> _Reply:
        entries = _entries(self._repo(request, repo_id).at(revision).files)
        return _json([entries[path] for path in parse_qs(request.body.decode())["paths"] if path in entries])

    def _refs(self, request: _Request, repo_id: str) -> _Reply:
        refs: dict[str, list[dict[str, str]]] = {"branches": [], "pullRequests": [], "tags": [], "converts": []}
        for name, oid in self._repo(request, repo_id).branches.items():
            is_pull = name.startswith("refs/pr/")
            ref = {"name": name, "ref": name if is_pull else f"refs/heads/{name}", "targetCommit": oid}
            refs["pullRequests" if is_pull else "branches"].append(ref)
        return _json(refs)

    def _commits(self, request: _Request, repo_id: str, revision: str) -> _Reply:
        listed = []
        for commit in self._repo(request, repo_id).history(revision):
            told = {"id": commit.oid, "title": commit.title, "message": commit.message, "date": commit.date}
            listed.append({**told, "authors": [{"user": self.user}]})
        return _json(listed)

    def _resolve(self, request: _Request, repo_id: str, revision: str, path: str) -> _Reply:
        repo = self._repo(request, repo_id)
        if repo.gated and not self._owns(request, repo_id):
            message = f"Access to model {repo_id} is restricted and you are not in the authorized list."
            raise _Refusal(403 if request.token else 401, message, "GatedRepo")
        commit = repo.at(revision)
        headers = {"X-Repo-Commit": commit.oid}
        if path not in commit.files:
            raise _Refusal(404, "Entry not found", "EntryNotFound", headers)
        file = commit.files[path]
        if not file.is_lfs:
            return _content(request, file.data, {"ETag": f'"{file.etag}"', **headers})
        headers |= {"X-Linked-Size": str(len(file.data)), "X-Linked-ETag": f'"{file.etag}"'}
        return _Reply(302, headers={"Location": f"{self._storage}/{file.sha256}", **headers})

    def _get_object(self, request: _Request, oid: str) -> _Reply:
        return _content(request, self._objects[oid], {"ETag": f'"{oid}"'})


def _json(payload: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> _Reply:
    body = json.dumps(payload, default=str).encode()  # YAML has dates, which JSON has not
    return _Reply(status, body, {"Content-Type": "application/json", **(headers or {})})


def _content(request: _Request, data: bytes, headers: Mapping[str, str]) -> _Reply:
    """Bytes, or the range of them that was asked for: a client resumes a download with ``bytes=START-``."""
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
    if not asked:
        return _Reply(200, data, {"Accept-Ranges": "bytes", **headers})
    start, end = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
    if start >= len(data):
        raise _Refusal(416, "The range is past the end.", headers={"Content-Range": f"bytes */{len(data)}"})
    return _Reply(206, data[start : end + 1], {"Content-Range": f"bytes {start}-{end}/{len(data)}", **headers})


def _entries(files: Mapping[str, StoredFile]) -> dict[str, dict[str, Any]]:
    """Files and the folders that hold them, by path, as listings give them."""
    entries: dict[str, dict[str, Any]] = {}
    for path, file in files.items():
        for folder in map(str, PurePosixPath(path).parents[:-1]):
            oid = hashlib.sha1(folder.encode()).hexdigest()
            entries[folder] = {"type": "directory", "path": folder, "oid": oid, "size": 0}
        entries[path] = {"type": "file", "path": path, "size": len(file.data)}
        # Trees and model infos call the same things by different names.
        entries[path] |= {"oid": file.git_oid, "blobId": file.git_oid}
        if file.is_lfs:
            lfs = {"oid": file.sha256, "sha256": file.sha256, "size": len(file.data), "pointerSize": len(file.git_blob)}
            entries[path]["lfs"] = lfs
    return entries


def _read_card(card: str) -> tuple[dict[str, Any], list[str]]:
    """The metadata between two ``---`` lines at the top of a card, or none, and what is wrong with it."""
    matter = _FRONT_MATTER.match(card)
    try:
        metadata = yaml.safe_load(matter[1] or "") if matter else {}
    except yaml.YAMLError as error:
        return {}, [f"The metadata is not YAML: {error}"]
    if not isinstance(metadata or {}, dict):
        return {}, ["The metadata must be a mapping"]
    metadata = metadata or {}
    errors = [] if isinstance(metadata.get("license", ""), str) else ['"license" must be a string']
    models = metadata.get("model-index", [])
    if not isinstance(models, list):
        return metadata, [*errors, '"model-index" must be an array']
    for index, model in enumerate(models):
        for key, kind in (("name", str), ("results", list)):
            if not isinstance(model, dict) or not isinstance(model.get(key), kind):
                errors.append(f'"model-index[{index}].{key}" is required')
    return metadata, errors


_API = "/api/models/(?P<repo_id>[^/]+/[^/]+)"
_GIT = "/(?P<repo_id>[^/]+/[^/]+)"
_LFS = f"{_GIT}[.]git/info/lfs/objects"
_REVISION = "(?P<revision>[^/]+)"
_OBJECT = "/lfs/(?P<oid>[0-9a-f]{64})"
_ROUTES: list[tuple[str, re.Pattern[str], Callable[..., _Reply]]] = [
    ("GET", re.compile("/api/whoami-v2"), LoopbackHub._whoami),
    ("POST", re.compile("/api/repos/create"), LoopbackHub._create_repo),
    ("POST", re.compile("/api/validate-yaml"), LoopbackHub._validate_yaml),
    ("POST", re.compile(f"{_API}/preupload/{_REVISION}"), LoopbackHub._preupload),
    ("POST", re.compile(f"{_LFS}/batch"), LoopbackHub._lfs_batch),
    ("PUT", re.compile(f"{_OBJECT}(/(?P<number>[0-9]+))?"), LoopbackHub._put_object),
    ("POST", re.compile("/api/complete_multipart"), LoopbackHub._complete_multipart),
    ("POST", re.compile(f"{_LFS}/verify"), LoopbackHub._verify_object),
    ("POST", re.compile(f"{_API}/commit/{_REVISION}"), LoopbackHub._commit),
    ("POST", re.compile(f"{_API}/branch/(?P<branch>[^/]+)"), LoopbackHub._create_branch),
    ("GET", re.compile(f"{_API}(/revision/{_REVISION})?"), LoopbackHub._model_info),
    ("GET", re.compile(f"{_API}/tree/{_REVISION}(/(?P<folder>.+))?"), LoopbackHub._tree),
    ("POST", re.compile(f"{_API}/paths-info/{_REVISION}"), LoopbackHub._paths_info),
    ("GET", re.compile(f"{_API}/refs"), LoopbackHub._refs),
    ("GET", re.compile(f"{_API}/commits/{_REVISION}"), LoopbackHub._commits),
    ("GET", re.compile(f"{_GIT}/resolve/{_REVISION}/(?P<path>.+)"), LoopbackHub._resolve),
    ("GET", re.compile(_OBJECT), LoopbackHub._get_object),
]
