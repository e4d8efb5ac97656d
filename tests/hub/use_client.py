"""Run by the tests: drives the server with `huggingface_hub` alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError


def error_of(call, *arguments, **options) -> str | None:
    try:
        call(*arguments, **options)
    except (EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError, ValueError) as error:
        return type(error).__name__
    return None


def main() -> None:
    folder = Path(sys.argv[1])
    api, repository = HfApi(), "someone/things"
    api.create_repo("things")
    files = {"small.txt": b"small", "deep/down/large.bin": bytes(range(256)) * 40, "empty.bin": b""}
    for name, content in files.items():
        path = folder / "upload" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    first = api.upload_folder(repo_id=repository, folder_path=folder / "upload").oid
    operations = [CommitOperationDelete("deep/"), CommitOperationAdd("small.txt", b"other")]
    second = api.create_commit(repository, operations, commit_message="Second").oid
    again = api.create_commit(repository, [CommitOperationAdd("small.txt", b"other")], commit_message="Same").oid
    old = Path(snapshot_download(repository, revision=first))
    results = {
        "user": api.whoami()["name"],
        "create again": [error_of(api.create_repo, "things"), error_of(api.create_repo, "things", exist_ok=True)],
        "old": {name: (old / name).read_bytes() == content for name, content in files.items()},
        "new": sorted(api.list_repo_files(repository)),
        "listed": sorted(entry.path for entry in api.list_repo_tree(repository, revision=first)),
        "listed deep": sorted(entry.path for entry in api.list_repo_tree(repository, revision=first, recursive=True)),
        "titles": [commit.title for commit in api.list_repo_commits(repository)],
        "nothing changed": again == second,
        "no file": error_of(hf_hub_download, repository, "missing"),
        "no revision": error_of(hf_hub_download, repository, "small.txt", revision="missing"),
        "no repository": error_of(hf_hub_download, "someone/missing", "small.txt"),
        "no token": error_of(api.create_repo, "other", token=False),
        "stale parent": error_of(
            api.create_commit,
            repository,
            [CommitOperationAdd("small.txt", b"late")],
            commit_message="Late",
            parent_commit=first,
        ),
        "bad card": error_of(
            api.upload_file,
            path_or_fileobj=b"---\nbase_model: /a/folder\n---\n",
            path_in_repo="README.md",
            repo_id=repository,
        ),
        "torch": "torch" in sys.modules,
    }
    (folder / "use_client.json").write_text(json.dumps(results))


main()
