"""The real client of huggingface_hub, in processes of its own, finds in the loopback hub what it finds in the Hub."""

from __future__ import annotations

import hashlib
import http.client
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers.loopback_hub import GITATTRIBUTES, READ_TOKEN, WRITE_TOKEN, LoopbackHub

MODEL = "tester/model"
CARD = b"---\nlicense: apache-2.0\ntags: [recursive]\nmodel-index:\n- name: m\n  results: []\n---\n# A model\n"
FILES = {
    "README.md": CARD,
    "config.json": b'{"model_type": "llama"}',
    "empty.txt": b"",
    "model.safetensors": random.Random(0).randbytes(300_000),
    "nested/deep/adapter.safetensors": b"small, but weights",
    "nested/tokenizer.json": b"{}" * 6_000,
}
WEIGHTS = {hashlib.sha256(data).hexdigest() for data in FILES.values() if len(data) >= 10_000 or b"weights" in data}
PRELUDE = """
import json, sys, time
from pathlib import Path
import huggingface_hub as hf
from huggingface_hub import HfApi, ModelCard, CommitOperationAdd, CommitOperationDelete

MODEL, folder, out = "tester/model", Path(sys.argv[1]), {}

def error_of(call, *args, **kwargs):
    try:
        return call(*args, **kwargs) and None
    except Exception as error:
        return f"{type(error).__name__} {getattr(getattr(error, 'response', None), 'status_code', '')}".strip()
"""
UPLOAD = "out['commit'] = hf.upload_folder(repo_id=MODEL, folder_path=folder).oid\n"


@pytest.fixture
def hub():
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture
def folder(tmp_path) -> Path:
    for name, data in FILES.items():
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "folder"


def run_client(hub: LoopbackHub, folder: Path, script: str, token: str | None = WRITE_TOKEN) -> dict[str, Any]:
    """What ``script`` leaves in ``out``."""
    command = [sys.executable, "-c", f"{PRELUDE}{script}\nprint(json.dumps(out))", str(folder)]
    environment = hub.environment(folder.parent / str(token), token)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def uploads(hub: LoopbackHub) -> list[int]:
    """The statuses of the LFS uploads so far."""
    return [status for method, _, status in hub.requests if method == "PUT"]


def test_a_folder_comes_back(hub, folder):
    """Nested, empty and LFS files, from a private repository into an empty cache."""
    script = """
out["name"] = hf.whoami()["name"]
out["url"] = hf.create_repo(MODEL, private=True)
out["again"] = error_of(hf.create_repo, MODEL)
hf.create_repo(MODEL, exist_ok=True)
hf.upload_folder(repo_id=MODEL, folder_path=folder)
info = hf.model_info(MODEL, files_metadata=True)
out["info"] = [info.sha, info.private, info.gated, info.tags, info.card_data.license]
out["sizes"] = {file.rfilename: file.size for file in info.siblings}
out["tree"] = [entry.path for entry in hf.list_repo_tree(MODEL)]
out["nested"] = [entry.path for entry in hf.list_repo_tree(MODEL, "nested", recursive=True)]
snapshot = Path(hf.snapshot_download(MODEL))
out["files"] = {str(p.relative_to(snapshot)): p.read_bytes().hex() for p in snapshot.rglob("*") if p.is_file()}
out["verified"] = len(HfApi().verify_repo_checksums(MODEL).mismatches)
"""
    out = run_client(hub, folder, script)
    expected = GITATTRIBUTES | FILES
    assert hub.files(MODEL) == expected == {name: bytes.fromhex(data) for name, data in out["files"].items()}
    assert set(hub.received_lfs) == WEIGHTS
    assert out["name"] == "tester"
    assert out["url"] == f"{hub.endpoint}/{MODEL}"
    assert out["again"] == "HfHubHTTPError 409"
    assert out["info"] == [hub.commits(MODEL)[0].oid, True, False, ["recursive"], "apache-2.0"]
    assert out["sizes"] == {name: len(data) for name, data in expected.items()}
    assert out["tree"] == [*sorted([*GITATTRIBUTES, *(name for name in FILES if "/" not in name), "nested"])]
    assert out["nested"] == ["nested/deep", "nested/deep/adapter.safetensors", "nested/tokenizer.json"]
    assert out["verified"] == 0


def test_what_is_there_is_not_sent_again(hub, folder):
    """Neither an unchanged folder nor known weights under another name."""
    hub.add_repo(MODEL, FILES)
    assert run_client(hub, folder, UPLOAD)["commit"] == hub.commits(MODEL)[0].oid
    assert len(hub.commits(MODEL)) == 1
    (folder / "config.json").write_bytes(b"{}")
    (folder / "model.safetensors").rename(folder / "renamed.safetensors")
    assert run_client(hub, folder, UPLOAD)["commit"] == hub.commits(MODEL)[0].oid
    before, after = hub.commits(MODEL)[1].files, hub.commits(MODEL)[0].files
    assert {name for name in after if after[name] != before.get(name)} == {"config.json", "renamed.safetensors"}
    assert (hub.received_lfs, uploads(hub)) == ([], [])


def test_tokens(hub, folder):
    """A wrong one is told so, a read-only one reads, and who has none does not learn what is there."""
    hub.add_repo(MODEL, FILES, private=True)
    script = """
out["whoami"] = error_of(hf.whoami)
out["create"] = error_of(hf.create_repo, "tester/other")
out["upload"] = error_of(hf.upload_folder, repo_id=MODEL, folder_path=folder / "nested")
out["info"] = error_of(hf.model_info, MODEL)
out["download"] = error_of(hf.snapshot_download, MODEL)
"""
    assert set(run_client(hub, folder, script, token="hf_wrong").values()) == {"HfHubHTTPError 401"}
    assert run_client(hub, folder, script, token=READ_TOKEN) == {
        "whoami": None,
        "create": "HfHubHTTPError 403",
        "upload": "HfHubHTTPError 403",
        "info": None,
        "download": None,
    }
    assert run_client(hub, folder, script, token=None) == {
        "whoami": "LocalTokenNotFoundError",
        "create": "HfHubHTTPError 401",
        "upload": "RepositoryNotFoundError 401",
        "info": "RepositoryNotFoundError 401",
        "download": "RepositoryNotFoundError 401",
    }


def test_what_is_missing_and_what_is_gated(hub, folder):
    """Each has an error class of its own."""
    hub.add_repo(MODEL, FILES, gated=True)
    hub.add_repo("other/gated", FILES, gated=True)
    hub.add_repo("other/private", FILES, private=True)
    script = """
load = hf.hf_hub_download
out["repo"] = error_of(load, "tester/missing", "config.json")
out["hidden"] = error_of(load, "other/private", "config.json")
out["revision"] = error_of(load, MODEL, "config.json", revision="missing")
out["file"] = error_of(load, MODEL, "missing.json")
out["folder"] = error_of(lambda: list(hf.list_repo_tree(MODEL, "missing")))
out["foreign"] = error_of(hf.upload_folder, repo_id="other/gated", folder_path=folder)
out["own"] = error_of(load, MODEL, "model.safetensors")
out["gated"] = error_of(load, "other/gated", "config.json")
out["anonymous"] = error_of(load, MODEL, "config.json", token=False)
out["info"] = hf.model_info("other/gated").gated
"""
    assert run_client(hub, folder, script) == {
        "repo": "RepositoryNotFoundError 404",
        "hidden": "RepositoryNotFoundError 404",
        "revision": "RevisionNotFoundError 404",
        "file": "RemoteEntryNotFoundError 404",
        "folder": "RemoteEntryNotFoundError 404",
        "foreign": "HfHubHTTPError 403",
        "own": None,
        "gated": "GatedRepoError 403",
        "anonymous": "GatedRepoError 401",
        "info": "manual",
    }


def test_branches_and_commits(hub, folder):
    """Revisions are apart; a commit deletes, expects its parent, and can be a pull request."""
    hub.add_repo(MODEL, FILES)
    script = """
hf.create_branch(MODEL, branch="tries/8")
out["again"] = error_of(hf.create_branch, MODEL, branch="tries/8")
parent = hf.model_info(MODEL, revision="tries/8").sha
commit = dict(commit_message="Change", revision="tries/8", parent_commit=parent)
changes = [CommitOperationDelete("nested/"), CommitOperationDelete("empty.txt"), CommitOperationAdd("a b/é.txt", b"!")]
out["commit"] = hf.create_commit(MODEL, operations=changes, **commit).oid
out["late"] = error_of(hf.create_commit, MODEL, operations=[CommitOperationAdd("late", b"")], **commit)
out["title"] = [commit.title for commit in hf.list_repo_commits(MODEL, revision="tries/8")]
out["text"] = Path(hf.hf_hub_download(MODEL, "a b/é.txt", revision="tries/8")).read_text()
out["paths"] = [entry.path for entry in hf.get_paths_info(MODEL, ["a b", "empty.txt"], revision="tries/8")]
add = CommitOperationAdd("new", b"new")
pull = hf.create_commit(MODEL, operations=[add], commit_message="Add", create_pr=True)
out["pull"] = [pull.pr_num, pull.pr_revision]
refs = hf.list_repo_refs(MODEL, include_pull_requests=True)
out["refs"] = [ref.name for ref in refs.branches + refs.pull_requests]
"""
    out = run_client(hub, folder, script)
    assert hub.files(MODEL) == GITATTRIBUTES | FILES
    changed = {name: data for name, data in FILES.items() if name != "empty.txt" and not name.startswith("nested")}
    assert hub.files(MODEL, "tries/8") == GITATTRIBUTES | changed | {"a b/é.txt": b"!"}
    assert hub.files(MODEL, "refs/pr/1") == GITATTRIBUTES | FILES | {"new": b"new"}
    assert out == {
        "again": "HfHubHTTPError 409",
        "commit": hub.commits(MODEL, "tries/8")[0].oid,
        "late": "HfHubHTTPError 412",
        "title": ["Change", "initial commit"],
        "text": "!",
        "paths": ["a b"],
        "pull": [1, "refs/pr/1"],
        "refs": ["main", "tries/8", "refs/pr/1"],
    }


def test_an_upload_that_is_cut(hub, folder):
    """The client gets over one cut; after as many as it tries, nothing is committed, and the next upload is whole."""
    hub.add_repo(MODEL, {})
    impatient = "time.sleep = lambda seconds: None\n"
    hub.cut_after(100_000, times=1000)
    out = run_client(
        hub, folder, impatient + "out['cut'] = error_of(hf.upload_folder, repo_id=MODEL, folder_path=folder)"
    )
    assert out == {"cut": "RuntimeError"}
    assert hub.files(MODEL) == GITATTRIBUTES
    assert hashlib.sha256(FILES["model.safetensors"]).hexdigest() not in hub.received_lfs
    assert 0 in uploads(hub)
    hub.requests.clear()
    hub.cut_after(100_000)
    run_client(hub, folder, impatient + UPLOAD)
    assert hub.files(MODEL) == GITATTRIBUTES | FILES
    assert uploads(hub).count(0) == 1


def test_large_objects_come_in_parts(folder):
    """They are put together again; an object of several requests is one object received."""
    with LoopbackHub(part_bytes=100_001) as hub:
        hub.add_repo(MODEL, {})
        run_client(hub, folder, UPLOAD)
        assert hub.files(MODEL) == GITATTRIBUTES | FILES
        assert sum(path.endswith(("/1", "/2", "/3")) for _, path, _ in hub.requests) == 3
        assert sorted(hub.received_lfs) == sorted(WEIGHTS)


def test_failures_are_tried_again_and_downloads_resumed(hub, folder):
    """A 503 is the client's to repeat; a download goes on from the bytes that it has."""
    hub.add_repo(MODEL, FILES)
    hub.fail_next(2, 503, "/preupload/")
    script = """
from huggingface_hub.file_download import http_get
time.sleep = lambda seconds: None
hf.upload_folder(repo_id=MODEL, folder_path=folder)
for name in ("model.safetensors", "nested/tokenizer.json"):
    with open(folder / name, "r+b") as file:
        file.truncate(200)
        file.seek(200)
        http_get(hf.hf_hub_url(MODEL, name), file, resume_size=200)
"""
    run_client(hub, folder, script)
    assert [status for _, path, status in hub.requests if "/preupload/" in path] == [503, 503, 200]
    assert sum(status == 206 for _, _, status in hub.requests) == 2
    for name, data in FILES.items():
        assert (folder / name).read_bytes() == data


def test_a_connection_is_kept(hub):
    """Also after a chunked body, which this version of the client never sends, a refused one and a HEAD."""
    hub.add_repo(MODEL, FILES)
    chunked = {"Transfer-Encoding": "chunked", "Authorization": f"Bearer {READ_TOKEN}"}
    card = json.dumps({"content": CARD.decode()}).encode()
    connection = http.client.HTTPConnection(hub.endpoint.removeprefix("http://"))
    statuses = []
    for method, path, body, headers in (
        ("POST", "/api/validate-yaml", iter([card[:7], card[7:]]), chunked),
        ("POST", f"/api/models/{MODEL}/commit/main", iter([b"{}"]), chunked),
        ("HEAD", f"/{MODEL}/resolve/main/config.json", None, {}),
        ("GET", f"/{MODEL}/resolve/main/config.json", None, {"Range": "bytes=2-11"}),
    ):
        connection.request(method, path, body, headers, encode_chunked=headers is chunked)
        sock = connection.sock
        reply = connection.getresponse()
        statuses.append(reply.status)
        content = reply.read()
        assert connection.sock is sock
    connection.close()
    assert statuses == [200, 403, 200, 206]
    assert content == FILES["config.json"][2:12]


def test_cards(hub, folder):
    """One is read; one with wrong metadata is refused by the Hub's validation before anything is sent."""
    hub.add_repo(MODEL, {"README.md": CARD})
    wrong = {
        "tags: [a": "not YAML",
        "- a": "must be a mapping",
        "license: 2": '"license" must be a string',
        "model-index: a": '"model-index" must be an array',
        "model-index: [{name: a}]": '"model-index[0].results" is required',
    }
    script = f"""
card = ModelCard.load(MODEL)
out["license"] = card.data.license
out["errors"] = []
for metadata in {list(wrong)}:
    (folder / "README.md").write_text("---\\n" + metadata + "\\n---\\n")
    try:
        hf.upload_folder(repo_id=MODEL, folder_path=folder)
    except ValueError as error:
        out["errors"].append(str(error))
"""
    out = run_client(hub, folder, script)
    assert out["license"] == "apache-2.0"
    assert all(message in error for message, error in zip(wrong.values(), out["errors"], strict=True))
    assert len(hub.commits(MODEL)) == 1
