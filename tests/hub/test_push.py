"""``recursify push`` against a Hub on this machine, by huggingface_hub's real client, in processes of their own."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from helpers.loopback_hub import GITATTRIBUTES, READ_TOKEN, WRITE_TOKEN, LoopbackHub
from helpers.tiny_models import random_ids
from recursify.modeling import RecursiveForCausalLM

REPO = "tester/tiny-recursive"

PULL = """
import json, sys
sys.modules["recursify"] = None
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
with torch.no_grad():
    torch.save(model(torch.tensor(json.loads(sys.argv[2]))).logits, sys.argv[3])
card = ModelCard.load(sys.argv[1])
assert card.data.license == "mit"
write = pipeline("text-generation", model=model, tokenizer=tokenizer)
print(write("Once", max_new_tokens=4, do_sample=False)[0]["generated_text"])
"""

PUSH_AGAIN_AND_AGAIN = """
import json, logging, sys, time
from pathlib import Path
time.sleep = lambda seconds: None  # the client waits between its own attempts
from recursify.errors import HubError
from recursify.hub.publication import Publication, sha256
from recursify.hub.upload import upload

stage = Path(sys.argv[1])
told = []
handler = logging.Handler()
handler.emit = lambda record: told.append(record.getMessage())
logging.getLogger("recursify.hub.upload").addHandler(handler)
for line in sys.stdin:
    told.clear()
    repo_id, token, changed = json.loads(line)

    def wait(seconds):
        if changed:
            with open(stage / changed, "ab") as file:
                file.write(b"more")

    files = {file.relative_to(stage).as_posix(): file for file in stage.rglob("*") if file.is_file()}
    sizes = {name: file.stat().st_size for name, file in files.items()}
    hashes = {name: sha256(file) for name, file in files.items()}
    publication = Publication(stage, sizes, hashes, [], None)
    try:
        outcome = upload(publication, repo_id, token=token, wait=wait).oid
    except HubError as error:
        outcome = str(error)
    print(json.dumps([outcome, told]), flush=True)
"""


PUSH_LOADED = """
import json, sys
from recursify import RecursifyError, RecursiveForCausalLM

model = RecursiveForCausalLM.from_pretrained(sys.argv[1])
try:
    print(model.push_to_hub(sys.argv[2], **json.loads(sys.argv[3])))
except RecursifyError as error:
    print(type(error).__name__, error)
"""


def push_loaded(hub: LoopbackHub, folder: Path, home: Path, **arguments: object) -> str:
    """Load ``folder`` and call ``push_to_hub`` in a process of its own; what it returned or raised."""
    command = [sys.executable, "-c", PUSH_LOADED, str(folder), REPO, json.dumps(arguments)]
    done = subprocess.run(command, env=hub.environment(home), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def recursify(
    hub: LoopbackHub, home: Path, *arguments: str, token: str | None = WRITE_TOKEN, code: int = 0, **more: str
) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    command = [sys.executable, "-m", "recursify", *arguments]
    environment = {**hub.environment(home, token), **more}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture
def push(hub, folder, tmp_path) -> Iterator[Callable[..., tuple[str, list[str]]]]:
    """Pushes the folder as it is, from one process: what came of it, and what was told on the way."""
    child = subprocess.Popen(
        [sys.executable, "-c", PUSH_AGAIN_AND_AGAIN, str(folder)],
        env=hub.environment(tmp_path / "home", token=None),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdin is not None
    assert child.stdout is not None

    def push_once(repo_id: str, token: str | None = WRITE_TOKEN, changed: str | None = None) -> tuple[str, list[str]]:
        """``changed`` grows while the upload waits for its next attempt."""
        print(json.dumps([repo_id, token, changed]), file=child.stdin, flush=True)
        outcome, told = json.loads(child.stdout.readline())
        return outcome, told

    yield push_once
    child.stdin.close()
    child.wait(timeout=30)


def pushed_files(folder: Path, hub: LoopbackHub, revision: str = "main") -> dict[str, bytes]:
    """What the Hub has, less what differs from the folder by intent: the card, the picture, the record."""
    made = {"README.md", "layout.svg", "recursify.json", *GITATTRIBUTES}
    return {name: data for name, data in hub.files(REPO, revision).items() if name not in made}


def test_a_model_makes_the_round_trip(hub, folder, tmp_path):
    """Pushed bytes are pulled bytes; logits are bit-identical where recursify cannot be imported; the card is valid."""
    done = recursify(hub, tmp_path / "a", "push", str(folder), REPO, "--private", "--license", "mit", "--json")
    facts = json.loads(done.stdout)
    assert facts["url"] == f"{hub.endpoint}/{REPO}"
    assert facts["commit"] == hub.commits(REPO)[0].oid
    assert facts["difference"] < 1e-4
    files = pushed_files(folder, hub)
    local = {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "recursify.json"}
    assert files == local
    assert b"\nlicense: mit\n" in hub.files(REPO)["README.md"]
    assert b"<svg" in hub.files(REPO)["layout.svg"]
    # Before an upload the client has the Hub validate the card. (ModelCard.validate asks the real one until 2.0.)
    assert ("POST", "/api/validate-yaml", 200) in hub.requests

    ids = random_ids(2, 7)
    command = [sys.executable, "-c", PULL, REPO, json.dumps(ids.tolist()), str(tmp_path / "logits.pt")]
    done = subprocess.run(command, env=hub.environment(tmp_path / "b"), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Once")
    with torch.no_grad():
        wanted = RecursiveForCausalLM.from_pretrained(folder).eval()(ids).logits
    assert torch.equal(torch.load(tmp_path / "logits.pt"), wanted)

    sent = len(hub.received_lfs)
    done = recursify(hub, tmp_path / "c", "push", str(folder), REPO, "--revision", "v2", "--license", "mit")
    assert "pushed" in done.stdout
    assert len(hub.received_lfs) == sent, "nothing is sent twice"
    assert pushed_files(folder, hub, "v2") == local


def test_a_dry_run_reaches_nobody(hub, folder, tmp_path):
    """Files, sizes and the card; no request."""
    done = recursify(hub, tmp_path, "push", str(folder), REPO, "--dry-run")
    sizes = dict(line.split() for line in done.stdout.splitlines() if line.startswith("model.safetensors"))
    assert sizes == {"model.safetensors": f"{(folder / 'model.safetensors').stat().st_size:,}"}
    assert "# tiny-recursive" in done.stdout
    assert "check: 1/1" in done.stderr
    assert hub.requests == []


def test_an_upload_cut_at_random_moments_is_resumed(hub, folder, push):
    """Ten times: it fails with what to do, the Hub has no half model, and the same call then sends what is missing."""
    shards = [folder / "model.safetensors", folder / "another.safetensors"]
    size = shards[0].stat().st_size
    draw = random.Random(0)
    for attempt in range(10):
        for shard in shards:
            shard.write_bytes(draw.randbytes(size))  # new ones every time, or the Hub would have them already
        repo_id = f"tester/cut-{attempt}"
        hub.cut_after(draw.randrange(size), times=1000)
        outcome, told = push(repo_id)
        assert "did not finish" in outcome
        assert "Run the same command again to resume" in outcome
        assert len(told) == 4
        assert all("Upload interrupted" in line for line in told)
        assert set(hub.files(repo_id)) == set(GITATTRIBUTES)
        hub.cut_after(0, times=0)
        outcome, told = push(repo_id)
        assert (outcome, told) == (hub.commits(repo_id)[0].oid, [])
        assert hub.files(repo_id) == GITATTRIBUTES | {file.name: file.read_bytes() for file in folder.iterdir()}
    assert len(hub.received_lfs) == len(set(hub.received_lfs)), "what had arrived was not sent again"


def test_an_overloaded_hub_is_tried_again(hub, folder, tmp_path):
    """The client does not repeat a commit; we do."""
    hub.fail_next(1, 503, "/commit/")
    done = recursify(hub, tmp_path, "push", str(folder), REPO)
    assert "Upload interrupted" in done.stderr
    assert pushed_files(folder, hub)


def test_a_folder_that_changes_during_the_upload_is_reported(hub, push):
    """By another process that still writes into it."""
    hub.fail_next(1, 503, "/commit/")
    outcome, _ = push(REPO, changed="model.safetensors")
    assert (
        "'model.safetensors' changed while it was checked or uploaded, so 'tester/tiny-recursive' may hold a mix"
        in outcome
    )


def test_who_may_not_write_is_told_so(hub, push):
    """No token, a wrong one, one that may only read, somebody else's account, no name."""
    hub.add_repo("tester/there", {})
    for token, repo_id, message in (
        (None, REPO, "refuses an upload to 'tester/tiny-recursive' without a valid token. Log in"),
        ("hf_wrong", REPO, "refuses an upload to 'tester/tiny-recursive' without a valid token. Log in"),
        (READ_TOKEN, REPO, "Your token may not write to 'tester/tiny-recursive'"),
        (READ_TOKEN, "tester/there", "Your token may not write to 'tester/there'"),
        (WRITE_TOKEN, "somebody/else", "Your token may not write to 'somebody/else'"),
        (WRITE_TOKEN, "a/b/c", "'a/b/c' is not a valid repository name"),
    ):
        outcome, told = push(repo_id, token)
        assert message in outcome
        assert told == [], "it would be no use to try again"


def test_an_interruption_after_the_commit_is_no_failed_upload(hub, folder, push):
    """Nor one when the repository is made."""
    hub.fail_next(2, 503, "/tree/")
    outcome, _ = push(REPO)
    assert outcome == hub.commits(REPO)[0].oid
    hub.fail_next(1, 503, "/api/repos/create")
    outcome, told = push("tester/another")
    assert outcome == hub.commits("tester/another")[0].oid
    assert "Upload interrupted" in told[0]


def test_offline_is_said(hub, folder, tmp_path):
    """The client would name an environment variable in the middle of a traceback."""
    done = recursify(hub, tmp_path, "push", str(folder), REPO, code=1, HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set, so nothing can be uploaded" in done.stderr


def test_a_repository_with_other_files_is_left_alone(hub, folder, tmp_path):
    """Unless told to overwrite: then they are gone."""
    hub.add_repo(REPO, {"old[1].bin": b"old", "config.json": b"{}"})
    done = recursify(hub, tmp_path, "push", str(folder), REPO, code=1)
    assert "has 1 files that this model does not have, first 'old[1].bin'" in done.stderr
    assert hub.files(REPO)["config.json"] == b"{}"
    recursify(hub, tmp_path, "push", str(folder), REPO, "--overwrite")
    assert "old[1].bin" not in hub.files(REPO)
    assert hub.files(REPO)["config.json"] == (folder / "config.json").read_bytes()
    done = recursify(hub, tmp_path, "push", str(folder), REPO, "--private", code=1)
    assert "exists and is public; --private applies to new repositories only" in done.stderr


def test_a_folder_that_fails_its_own_parity_is_not_pushed(hub, folder, tmp_path):
    """The config was edited by hand."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["rms_norm_eps"] = 0.5
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    done = recursify(hub, tmp_path, "push", str(folder), REPO, code=1)
    assert "does not reproduce its fingerprint" in done.stderr
    assert hub.requests == []


def test_push_to_hub_of_a_loaded_model_arrives_like_its_folder(hub, folder, tmp_path):
    """With tokenizer, card, picture and fingerprint, and with the same weights."""
    address = push_loaded(hub, folder, tmp_path / "home", private=True, commit_message="First")
    assert address == f"{hub.endpoint}/{REPO}/commit/{hub.commits(REPO)[0].oid}"
    files = hub.files(REPO)
    local = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert files.keys() == local.keys() | {"README.md", "layout.svg", *GITATTRIBUTES}
    for name in ("tokenizer.json", "modeling_recursive.py"):
        assert files[name] == local[name], name
    weights, wanted = load(files["model.safetensors"]), load(local["model.safetensors"])
    assert weights.keys() == wanted.keys()
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)
    assert b"\nlicense: apache-2.0\n" in files["README.md"]
    record = json.loads(files["recursify.json"])
    assert record["fingerprint"] == json.loads(local["recursify.json"])["fingerprint"]
    assert str(folder).encode() not in files["config.json"] + files["recursify.json"]


def test_push_to_hub_records_a_fingerprint_where_there_is_none(hub, folder, tmp_path):
    """A model from ``save_pretrained`` has no record."""
    (folder / "recursify.json").unlink()
    assert push_loaded(hub, folder, tmp_path).startswith(f"{hub.endpoint}/{REPO}/commit/")
    assert len(json.loads(hub.files(REPO)["recursify.json"])["fingerprint"]["choices"]) == 32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("config", "ParityError .* does not reproduce its fingerprint"),
        ("pickle", r"HubError '.*optimizer\.pt' is a pickle"),
        ("secret", r"HubError 'LICENSE' line 1 contains a likely secret"),
        ("argument", r"HubError push_to_hub\(\) of a recursive model does not support create_pr\. Omit it\."),
    ],
)
def test_push_to_hub_refuses_what_push_refuses(hub, folder, tmp_path, change, message):
    """The folder that the model was loaded from is checked like any other, and nothing reaches the Hub."""
    if change == "config":
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}), encoding="utf-8")
    elif change == "pickle":
        (folder / "optimizer.pt").write_bytes(b"pickle")
    elif change == "secret":
        (folder / "LICENSE").write_text("hf_" + "a" * 34, encoding="utf-8")
    arguments = {"create_pr": True} if change == "argument" else {}
    assert re.match(message, push_loaded(hub, folder, tmp_path, **arguments))
    if change != "argument":
        recursify(hub, tmp_path, "push", str(folder), REPO, code=1)
    assert hub.requests == []


def test_a_gated_base_model_says_where_to_accept_its_terms(hub, tmp_path):
    """At conversion, where its files are asked for."""
    hub.add_repo("org/gated", {"config.json": b"{}"}, gated=True)
    done = recursify(hub, tmp_path, "convert", "org/gated", "-o", str(tmp_path / "out"), token=READ_TOKEN, code=1)
    assert "'org/gated' is gated" in done.stderr
    assert "Accept them at" in done.stderr
    assert not (tmp_path / "out").exists()
