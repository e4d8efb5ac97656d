"""A Hugging Face Hub in memory, over real HTTP on loopback: repositories with history, LFS, and faults on demand.

It speaks the routes that `huggingface_hub` uses for models, without xet. What it has no answer for is answered by 501
and noted in `HubServer.unhandled`, so that a test sees when a client asks for more.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from hub_store import Blob, HubError, Repository, card_data, card_problems


USER = "someone"
TOKEN = "hf_dummy"
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".gguf")


@dataclass
class Fault:
    """What goes wrong with the next requests that fit: a status, or `None` for a connection that is cut.

    With `is_handled` the server does what it was asked for first, and only the answer is lost.
    """

    method: str
    path: str
    status: int | None
    times: int
    is_handled: bool = False
    has_struck: bool = False


class HubServer:
    """The Hub. `with HubServer() as hub:` serves it at `hub.url` from a thread of its own."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.lfs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.unhandled: list[str] = []
        self.lock = threading.RLock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def read(self, repo_id: str, path: str, revision: str = "main") -> bytes:
        """A file as the server has it, without HTTP."""
        repository = self.repositories[repo_id]
        return repository.commits[repository.resolve(revision)][path].content

    def files(self, repo_id: str, revision: str = "main") -> set[str]:
        """The names of the files of a repository, without HTTP."""
        repository = self.repositories[repo_id]
        return set(repository.commits[repository.resolve(revision)]) - {".gitattributes"}

    def history(self, repo_id: str) -> list[str]:
        """The titles of the commits of `main`, newest first."""
        repository = self.repositories[repo_id]
        return [repository.titles[sha] for sha in repository.log("main")]

    def check(self) -> None:
        """Raise `AssertionError` if a request was not understood, or a fault has met no request that it fits."""
        assert self.unhandled == []
        missed = [fault for fault in self.faults if not fault.has_struck]
        assert not missed, missed

    # what the routes do

    def fail_next(self, request: Request) -> Answer:
        """Not of the Hub: a test asks for a fault."""
        self.faults.append(Fault(**request.json()))
        return Answer()

    def create(self, request: Request) -> Answer:
        request.check_token()
        asked = request.json()
        if asked.get("type", "model") != "model":
            raise HubError(501, message="models only")
        repo_id = f"{asked.get('organization') or USER}/{asked['name']}"
        url = {"url": f"{self.url}/{repo_id}", "name": repo_id}
        if repo_id in self.repositories:
            raise HubError(409, message="You already created this model repo", **url)
        private = asked.get("private") or asked.get("visibility") == "private"
        repository = self.repositories[repo_id] = Repository(bool(private))
        repository.commit("main", {".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)}, "initial commit")
        return Answer(url)

    def whoami(self, request: Request) -> Answer:
        request.check_token()
        return Answer({"type": "user", "name": USER, "orgs": [], "auth": {"type": "access_token"}})

    def agents(self, request: Request) -> Answer:
        """What `hf` asks for on the command line, to tell who calls it."""
        return Answer({"standardEnvVars": [], "harnesses": {}})

    def validate_yaml(self, request: Request) -> Answer:
        errors = card_problems(request.json()["content"])
        body = {"errors": [{"message": message} for message in errors], "warnings": []}
        return Answer(body, status=400 if errors else 200)

    def preupload(self, request: Request, repo_id: str, revision: str) -> Answer:
        request.check_token()
        repository = self.repository(request, repo_id)
        present = repository.commits[repository.resolve(revision)]
        answers = []
        for file in request.json()["files"]:
            path = file["path"]
            answers.append(
                {
                    "path": path,
                    "uploadMode": "lfs" if path.endswith(LFS_SUFFIXES) else "regular",
                    "shouldIgnore": False,
                    "oid": present[path].etag if path in present else None,
                }
            )
        return Answer({"files": answers})

    def lfs_batch(self, request: Request, repo_id: str) -> Answer:
        request.check_token()
        self.repository(request, repo_id)
        objects = []
        for wanted in request.json()["objects"]:
            action = {"href": f"{self.url}/lfs/{wanted['oid']}", "header": {}}
            actions = {} if wanted["oid"] in self.lfs else {"upload": action, "verify": action}
            objects.append({**wanted, **({"actions": actions} if actions else {})})
        return Answer({"transfer": "basic", "objects": objects})

    def lfs_upload(self, request: Request, oid: str) -> Answer:
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise HubError(400, message=f"the content does not have the sha256 {oid}")
        self.lfs[oid] = request.body
        return Answer()

    def lfs_verify(self, request: Request, oid: str) -> Answer:
        asked = request.json()
        if asked["oid"] != oid or len(self.lfs.get(oid, b"")) != asked["size"]:
            raise HubError(404, message=f"there is no object {asked}")
        return Answer()

    def commit(self, request: Request, repo_id: str, revision: str) -> Answer:
        """All of a commit or nothing: the branch moves after the last line has been understood."""
        request.check_token()
        repository = self.repository(request, repo_id)
        files = dict(repository.commits[repository.resolve(revision)])
        if revision not in repository.branches:
            raise HubError(403, message=f"{revision} is no branch")
        title = ""
        for line in request.body.splitlines():
            key, value = (item := json.loads(line))["key"], item["value"]
            if key == "header":
                title = value["summary"]
                if value.get("parentCommit") not in (None, repository.branches[revision]):
                    raise HubError(412, message="A commit has happened since")
            elif key == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"], validate=True), False)
            elif key == "lfsFile":
                if value["oid"] not in self.lfs:
                    raise HubError(400, message=f"{value['path']} has not been uploaded")
                files[value["path"]] = Blob(self.lfs[value["oid"]], True)
            elif key in ("deletedFile", "deletedFolder"):
                gone = [p for p in files if p == value["path"] or p.startswith(value["path"].rstrip("/") + "/")]
                if not gone:
                    raise HubError(404, "EntryNotFound", "A file with this name doesn't exist")
                for path in gone:
                    del files[path]
            else:
                raise HubError(501, message=f"unknown line {key}")
        sha = repository.commit(revision, files, title)
        return Answer({"success": True, "commitOid": sha, "commitUrl": f"{self.url}/{repo_id}/commit/{sha}"})

    def create_branch(self, request: Request, repo_id: str, branch: str) -> Answer:
        request.check_token()
        repository = self.repository(request, repo_id)
        if branch in repository.branches:
            raise HubError(409, message=f"Reference already exists: {branch}")
        start = (request.json() if request.body else {}).get("startingPoint") or "main"
        repository.branches[branch] = repository.resolve(start)
        return Answer()

    def info(self, request: Request, repo_id: str, revision: str = "main") -> Answer:
        repository = self.repository(request, repo_id)
        sha = repository.resolve(revision)
        files = repository.commits[sha]
        card = card_data(files["README.md"].content.decode()) if "README.md" in files else {}
        return Answer(
            {
                "id": repo_id,
                "modelId": repo_id,
                "sha": sha,
                "private": repository.private,
                "siblings": [{"rfilename": path} for path in sorted(files)],
                "tags": card.get("tags") or [],
                "library_name": card.get("library_name"),
                "cardData": card,
            }
        )

    def commits(self, request: Request, repo_id: str, revision: str) -> Answer:
        repository = self.repository(request, repo_id)
        entry = {"authors": [{"user": USER}], "date": "2026-01-01T00:00:00.000Z", "message": ""}
        return Answer([{**entry, "id": sha, "title": repository.titles[sha]} for sha in repository.log(revision)])

    def tree(self, request: Request, repo_id: str, revision: str, folder: str | None = None) -> Answer:
        repository = self.repository(request, repo_id)
        files = repository.commits[repository.resolve(revision)]
        start = f"{folder}/" if folder else ""
        below = {path: blob.listing(path) for path, blob in files.items() if path.startswith(start)}
        if folder and not below:
            raise HubError(404, "EntryNotFound", f"{folder} does not exist on {revision}")
        for path in list(below):
            for parent in map(str, PurePosixPath(path).parents):
                if parent != "." and parent.startswith(start):
                    below[parent] = {"type": "directory", "path": parent, "size": 0, "oid": "0" * 40}
        is_recursive = request.query.get("recursive", ["false"])[0].lower() in ("1", "true")
        listing = [entry for path, entry in sorted(below.items()) if is_recursive or "/" not in path[len(start) :]]
        return Answer(listing)

    def resolve(self, request: Request, repo_id: str, revision: str, path: str) -> Answer:
        repository = self.repository(request, repo_id)
        sha = repository.resolve(revision)
        blob = repository.commits[sha].get(path)
        headers = {"X-Repo-Commit": sha}
        if blob is None:
            raise HubError(404, "EntryNotFound", f"{path} does not exist on {revision}")
        headers |= {"ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"}
        if blob.is_lfs:
            headers |= {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(len(blob.content))}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
        if wanted is None:
            return Answer(blob.content, headers=headers)
        start, end = int(wanted[1]), int(wanted[2] or len(blob.content) - 1)
        headers["Content-Range"] = f"bytes {start}-{end}/{len(blob.content)}"
        return Answer(blob.content[start : end + 1], status=206, headers=headers)

    def repository(self, request: Request, repo_id: str) -> Repository:
        """A repository that whoever asks may see.

        Raises:
            HubError: there is none; the answer does not tell whether a private one exists.
        """
        repository = self.repositories.get(repo_id)
        if repository is None or (repository.private and not request.has_token):
            raise HubError(404 if request.has_token else 401, "RepoNotFound", "Repository not found")
        return repository


@dataclass
class Request:
    """What was asked."""

    body: bytes
    headers: Any
    query: dict[str, list[str]]

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def has_token(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def check_token(self) -> None:
        if not self.has_token:
            raise HubError(401, message="Invalid username or password.")


@dataclass
class Answer:
    """What is answered: bytes as they are, anything else as JSON. Without a status the connection is cut."""

    body: Any = field(default_factory=dict)
    status: int | None = 200
    headers: dict[str, str] = field(default_factory=dict)


NAME = r"(?P<repo_id>[\w.-]+/[\w.-]+)"
ROUTES: list[tuple[str, str, Callable[..., Answer]]] = [
    ("POST", "/fail-next", HubServer.fail_next),
    ("POST", "/api/repos/create", HubServer.create),
    ("GET", "/api/whoami-v2", HubServer.whoami),
    ("GET", "/api/agent-harnesses", HubServer.agents),
    ("POST", "/api/validate-yaml", HubServer.validate_yaml),
    ("POST", f"/api/models/{NAME}/preupload/(?P<revision>[^/]+)", HubServer.preupload),
    ("POST", f"/api/models/{NAME}/commit/(?P<revision>[^/]+)", HubServer.commit),
    ("POST", f"/api/models/{NAME}/branch/(?P<branch>[^/]+)", HubServer.create_branch),
    ("GET", f"/api/models/{NAME}/commits/(?P<revision>[^/]+)", HubServer.commits),
    ("GET", f"/api/models/{NAME}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", HubServer.tree),
    ("GET", f"/api/models/{NAME}(/revision/(?P<revision>[^/]+))?", HubServer.info),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", HubServer.lfs_batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", HubServer.lfs_upload),
    ("POST", "/lfs/(?P<oid>[0-9a-f]{64})", HubServer.lfs_verify),
    ("GET", f"/{NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", HubServer.resolve),
]


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def handle_any(self) -> None:
        address = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self._chunks()
        request = Request(body, self.headers, parse_qs(address.query))
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {address.path}")
            fault = self._fault(address.path)
            try:
                if fault is None or fault.is_handled:
                    answer = self._answer(address.path, request)
                if fault is not None:
                    answer = Answer(status=fault.status)
            except HubError as error:
                headers = {"X-Error-Message": str(error), **({"X-Error-Code": error.code} if error.code else {})}
                answer = Answer(error.body, error.status, headers)
                if error.status == 501:
                    self.hub.unhandled.append(f"{self.command} {self.path}: {error}")
        if answer.status is None:
            self.close_connection = True
        else:
            self._send(answer)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = handle_any

    def _answer(self, path: str, request: Request) -> Answer:
        for method, pattern, handler in ROUTES:
            found = re.fullmatch(pattern, path)
            if found and method == ("GET" if self.command == "HEAD" else self.command):
                parts = {name: unquote(value) for name, value in found.groupdict().items() if value is not None}
                return handler(self.hub, request, **parts)
        raise HubError(501, message="unhandled route")

    def _fault(self, path: str) -> Fault | None:
        for fault in self.hub.faults:
            if fault.times and fault.method == self.command and re.fullmatch(fault.path, path):
                fault.times -= 1
                fault.has_struck = True
                return fault
        return None

    def _chunks(self) -> bytes:
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _send(self, answer: Answer) -> None:
        is_file = isinstance(answer.body, bytes)
        content = answer.body if is_file else json.dumps(answer.body).encode()
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/octet-stream" if is_file else "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        """Be quiet."""
