"""The Hub of the tests does what `huggingface_hub` expects of the real one, and says so where it cannot."""

from __future__ import annotations

import hashlib
import json
import urllib.error
import urllib.request
from typing import Any

import pytest
from hub_process import run_script
from hub_server import TOKEN, HubServer
from hub_store import card_problems


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


def ask(hub: HubServer, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, dict, bytes]:
    """Status, headers and content of the answer."""
    headers = {"Authorization": f"Bearer {TOKEN}", **headers}
    request = urllib.request.Request(f"{hub.url}{path}", body or None, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, dict(answer.headers), answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, dict(error.headers), error.read()


def commit(hub: HubServer, *lines: dict[str, Any]) -> int:
    ask(hub, "POST", "/api/repos/create", b'{"name": "things"}')
    body = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    return ask(hub, "POST", "/api/models/someone/things/commit/main", body)[0]


HEADER = {"key": "header", "value": {"summary": "Title"}}
SMALL = {"key": "file", "value": {"path": "small.txt", "content": "c21hbGw=", "encoding": "base64"}}


@pytest.mark.slow
def test_the_client_of_the_hub_is_served(hub, tmp_path):
    (tmp_path / "shared").mkdir()
    results = run_script(hub, "use_client.py", tmp_path / "shared", tmp_path / "home")
    assert results == {
        "user": "someone",
        "create again": ["HfHubHTTPError", None],
        "old": {"small.txt": True, "deep/down/large.bin": True, "empty.bin": True},
        "new": [".gitattributes", "empty.bin", "small.txt"],
        "listed": [".gitattributes", "deep", "empty.bin", "small.txt"],
        "listed deep": [".gitattributes", "deep", "deep/down", "deep/down/large.bin", "empty.bin", "small.txt"],
        "titles": ["Second", "Upload folder using huggingface_hub", "initial commit"],
        "nothing changed": True,
        "no file": "RemoteEntryNotFoundError",
        "no revision": "RevisionNotFoundError",
        "no repository": "RepositoryNotFoundError",
        "no token": "HfHubHTTPError",
        "stale parent": "HfHubHTTPError",
        "bad card": "ValueError",
        "torch": False,
    }
    assert hub.unhandled == []
    assert any(request.startswith("PUT /lfs/") for request in hub.requests)


def test_an_unknown_route_is_answered_by_501_and_noted(hub):
    assert ask(hub, "GET", "/api/datasets/someone/things?full=1")[0] == 501
    assert ask(hub, "DELETE", "/api/repos/delete")[0] == 501
    assert hub.unhandled == [
        "GET /api/datasets/someone/things?full=1: unhandled route",
        "DELETE /api/repos/delete: unhandled route",
    ]


def test_content_with_another_checksum_is_refused(hub):
    oid = hashlib.sha256(b"right").hexdigest()
    assert ask(hub, "PUT", f"/lfs/{oid}", b"wrong")[0] == 400
    assert ask(hub, "POST", f"/lfs/{oid}", json.dumps({"oid": oid, "size": 5}).encode())[0] == 404
    assert ask(hub, "PUT", f"/lfs/{oid}", b"right")[0] == 200
    assert ask(hub, "POST", f"/lfs/{oid}", json.dumps({"oid": oid, "size": 5}).encode())[0] == 200


def test_a_commit_counts_as_a_whole_or_not_at_all(hub):
    missing = {"key": "lfsFile", "value": {"path": "large.bin", "algo": "sha256", "oid": "0" * 64, "size": 5}}
    assert commit(hub, HEADER, SMALL, missing) == 400
    assert hub.files("someone/things") == set()
    assert hub.history("someone/things") == ["initial commit"]
    assert commit(hub, HEADER, SMALL) == 200
    assert hub.files("someone/things") == {"small.txt"}


def test_a_file_is_served_with_its_etag_and_in_parts(hub):
    commit(hub, HEADER, SMALL)
    path = "/someone/things/resolve/main/small.txt"
    status, headers, content = ask(hub, "GET", path)
    assert (status, content) == (200, b"small")
    assert headers["ETag"] == '"{}"'.format(hashlib.sha1(b"blob 5\0small").hexdigest())
    assert headers["X-Repo-Commit"] == hub.repositories["someone/things"].branches["main"]
    status, headers, content = ask(hub, "GET", path, Range="bytes=2-")
    assert (status, content, headers["Content-Range"]) == (206, b"all", "bytes 2-4/5")
    status, headers, content = ask(hub, "HEAD", path)
    assert (status, content, headers["Content-Length"]) == (200, b"", "5")


def test_a_fault_strikes_as_often_as_asked(hub):
    fault = {"method": "GET", "path": "/api/whoami-v2", "status": 503, "times": 1}
    ask(hub, "POST", "/fail-next", json.dumps(fault).encode())
    with pytest.raises(AssertionError, match="whoami"):
        hub.check()
    assert [ask(hub, "GET", "/api/whoami-v2")[0] for _ in range(2)] == [503, 200]
    hub.check()


@pytest.mark.parametrize(
    ("card", "problem"),
    [
        ("no metadata", None),
        ("---\nbase_model: someone/base\ntags: [a, b]\n---\n", None),
        ("---\nbase_model: [someone/base, gpt2]\n---\n", None),
        ("---\nbase_model: /a/folder\n---\n", '"base_model" with value "/a/folder" is not valid'),
        ("---\ntags: one\n---\n", '"tags" must be an array'),
        ("---\ntags: [1]\n---\n", '"tags" must be an array'),
        ("---\nlibrary_name: [peft]\n---\n", '"library_name" must be a string'),
        ("---\na: [\n---\n", "invalid YAML"),
    ],
    ids=["empty", "base", "bases", "folder", "text", "number", "list", "broken"],
)
def test_rules_for_cards(card, problem):
    problems = card_problems(card)
    assert (problems == []) if problem is None else (len(problems) == 1 and problem in problems[0])
