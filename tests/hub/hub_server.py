"""A Hugging Face Hub in memory, over real HTTP on loopback: repositories with history, LFS and rules for model cards.

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

import yaml


USER = "someone"
TOKEN = "hf_dummy"
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".gguf")
REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
FRONT_MATTER = re.compile(r"\A---\r?\n(.*?)\r?\n---", re.DOTALL)


class HubError(Exception):
    """An answer that says no."""

    def __init__(self, status: int, code: str | None = None, message: str = "", **body: Any) -> None:
        super().__init__(message)
        self.status, self.code, self.body = status, code, {"error": message, **body}


@dataclass(frozen=True)
class Blob:
    """A file at one point of history."""

    content: bytes
    is_lfs: bool

    @property
    def git_oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def etag(self) -> str:
        return hashlib.sha256(self.content).hexdigest() if self.is_lfs else self.git_oid

    def listing(self, path: str) -> dict[str, Any]:
        entry = {"type": "file", "path": path, "size": len(self.content), "oid": self.git_oid}
        if self.is_lfs:
            entry["lfs"] = {"oid": self.etag, "size": len(self.content), "pointerSize": 134}
        return entry


@dataclass
class Repository:
    """Files of every commit, and what the branches point to."""

    private: bool = False
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    titles: dict[str, str] = field(default_factory=dict)
    parents: dict[str, str | None] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, Blob], title: str) -> str:
        """Move `branch` to a new commit that holds `files`."""
        listing = "".join(f"{path} {blob.etag}\n" for path, blob in sorted(files.items()))
        sha = hashlib.sha1(f"{len(self.commits)} {title}\n{listing}".encode()).hexdigest()
        self.parents[sha] = self.branches.get(branch)
        self.commits[sha], self.titles[sha], self.branches[branch] = files, title, sha
        return sha

    def log(self, revision: str) -> list[str]:
        """The commits that led to a revision, newest first."""
        found: list[str] = []
        sha: str | None = self.resolve(revision)
        while sha is not None:
            found.append(sha)
            sha = self.parents[sha]
        return found

    def resolve(self, revision: str) -> str:
        """The commit that a branch or a commit id means; `HubError` if there is none."""
        sha = self.branches.get(revision, revision)
        if sha not in self.commits:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha


def card_data(content: str) -> dict[str, Any]:
    """The metadata at the head of a model card."""
    found = FRONT_MATTER.match(content)
    return (yaml.safe_load(found[1]) or {}) if found else {}


def card_problems(content: str) -> list[str]:
    """What the Hub is known to refuse in a model card; the real one checks more."""
    try:
        data = card_data(content)
    except yaml.YAMLError as error:
        return [f"invalid YAML: {error}"]
    bases = data.get("base_model") or []
    problems = [
        f'"base_model" with value "{base}" is not valid. Use a model id from https://hf.co/models.'
        for base in ([bases] if isinstance(bases, str) else bases)
        if not REPO_ID.fullmatch(base)
    ]
    tags = data.get("tags") or []
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        problems.append('"tags" must be an array of strings')
    names = ("library_name", "pipeline_tag", "license")
    return problems + [f'"{name}" must be a string' for name in names if not isinstance(data.get(name, ""), str)]


class HubServer:
    """The Hub. `with HubServer() as hub:` serves it at `hub.url` from a thread of its own."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.lfs: dict[str, bytes] = {}
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

    # what the routes do

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
        paths = [file["path"] for file in request.json()["files"]]
        kinds = ["lfs" if path.endswith(LFS_SUFFIXES) else "regular" for path in paths]
        oids = [present[path].etag if path in present else None for path in paths]
        files = zip(paths, kinds, oids, strict=True)
        return Answer({"files": [{"path": p, "uploadMode": k, "shouldIgnore": False, "oid": o} for p, k, o in files]})

    def lfs_batch(self, request: Request, repo_id: str) -> Answer:
        request.check_token()
        self.repository(request, repo_id)
        objects = []
        for wanted in request.json()["objects"]:
            upload = {"actions": {"upload": {"href": f"{self.url}/lfs/{wanted['oid']}", "header": {}}}}
            objects.append({**wanted, **({} if wanted["oid"] in self.lfs else upload)})
        return Answer({"transfer": "basic", "objects": objects})

    def lfs_upload(self, request: Request, oid: str) -> Answer:
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise HubError(400, message=f"the content does not have the sha256 {oid}")
        self.lfs[oid] = request.body
        return Answer()

    def commit(self, request: Request, repo_id: str, revision: str) -> Answer:
        request.check_token()
        repository = self.repository(request, repo_id)
        files = dict(repository.commits[repository.resolve(revision)])
        title = ""
        for line in request.body.splitlines():
            key, value = (item := json.loads(line))["key"], item["value"]
            if key == "header":
                title = value["summary"]
            elif key == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"], validate=True), False)
            elif key == "lfsFile":
                files[value["path"]] = Blob(self.lfs[value["oid"]], True)
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
        return Answer(
            [entry for path, entry in sorted(below.items()) if is_recursive or "/" not in path[len(start) :]]
        )

    def resolve(self, request: Request, repo_id: str, revision: str, path: str) -> Answer:
        repository = self.repository(request, repo_id)
        sha = repository.resolve(revision)
        blob = repository.commits[sha].get(path)
        if blob is None:
            raise HubError(404, "EntryNotFound", f"{path} does not exist on {revision}")
        headers = {"X-Repo-Commit": sha, "ETag": f'"{blob.etag}"'}
        if blob.is_lfs:
            headers |= {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(len(blob.content))}
        return Answer(blob.content, headers=headers)

    def repository(self, request: Request, repo_id: str) -> Repository:
        """A repository that whoever asks may see; else the answer does not tell whether a private one exists."""
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
    """What is answered: bytes as they are, anything else as JSON."""

    body: Any = field(default_factory=dict)
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


NAME = r"(?P<repo_id>[\w.-]+/[\w.-]+)"
ROUTES: list[tuple[str, str, Callable[..., Answer]]] = [
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
            try:
                answer = self._answer(address.path, request)
            except HubError as error:
                headers = {"X-Error-Message": str(error), **({"X-Error-Code": error.code} if error.code else {})}
                answer = Answer(error.body, error.status, headers)
                if error.status == 501:
                    self.hub.unhandled.append(f"{self.command} {self.path}: {error}")
        self._send(answer)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = handle_any

    def _answer(self, path: str, request: Request) -> Answer:
        for method, pattern, handler in ROUTES:
            found = re.fullmatch(pattern, path)
            if found and method == ("GET" if self.command == "HEAD" else self.command):
                parts = {name: unquote(value) for name, value in found.groupdict().items() if value is not None}
                return handler(self.hub, request, **parts)
        raise HubError(501, message="unhandled route")

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
