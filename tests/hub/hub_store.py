"""What the Hub of the tests keeps: files, commits and branches of a repository; and its rules for model cards."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import yaml


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

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def git_oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.git_oid

    def listing(self, path: str) -> dict[str, Any]:
        entry = {"type": "file", "path": path, "size": len(self.content), "oid": self.git_oid}
        if self.is_lfs:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.content), "pointerSize": 134}
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
        """The commit that a branch or a commit id means.

        Raises:
            HubError: there is no such revision.
        """
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
    problems = []
    bases = data.get("base_model") or []
    for base in [bases] if isinstance(bases, str) else bases:
        if not REPO_ID.fullmatch(base):
            problems.append(
                f'"base_model" with value "{base}" is not valid. Use a model id from https://hf.co/models.'
            )
    tags = data.get("tags") or []
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        problems.append('"tags" must be an array of strings')
    for name in ("library_name", "pipeline_tag", "license"):
        if not isinstance(data.get(name, ""), str):
            problems.append(f'"{name}" must be a string')
    return problems
