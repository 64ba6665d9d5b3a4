"""What may go to the Hub: a model that loads and says what it said, and nothing else."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file, save_file

from recursify.checkpoint.record import read_record, update_record
from recursify.errors import HubError, ParityError
from recursify.hub.publication import (
    TRAVELLING_FILES,
    check_folder,
    check_loading,
    read_card,
    stage_publication,
    without_local_paths,
)


def test_a_model_is_laid_out_with_card_and_record(trained, tmp_path):
    """Weights by links, the record without paths of this machine, checkpoints left out; loaded without recursify."""
    (trained / "checkpoints" / "checkpoint-1").mkdir(parents=True)
    (trained / "checkpoints" / "checkpoint-1" / "optimizer.pt").write_bytes(b"moments")
    (trained / "metrics.jsonl").write_text('{"step": 1}\n', encoding="utf-8")
    stage = tmp_path / "stage"
    stage.mkdir()
    publication = stage_publication(trained, stage, "# Card\n", {"layout.svg": "<svg/>"})
    names = set(publication.sizes)
    assert {"config.json", "model.safetensors", "tokenizer.json", "metrics.jsonl", "README.md", "layout.svg"} <= names
    assert set(TRAVELLING_FILES) <= names
    assert publication.left_out == ["checkpoints"]
    assert publication.sizes["model.safetensors"] == (trained / "model.safetensors").stat().st_size
    assert publication.difference is not None
    assert publication.difference < 1e-4
    run = json.loads((stage / "recursify.json").read_text(encoding="utf-8"))["history"][0]
    assert run["data_name"] == "notes"
    assert run["settings"]["data"] == ["notes", "owner/stories"]
    assert read_record(trained)["history"][0]["data_name"] == "/home/me/notes"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("pytorch_model.bin", "x", "is a pickle, which can run any code .* move it out"),
        ("notes.docx", "x", "is no part of a recursive model, so it was not meant to be uploaded"),
        ("README.md", "token: hf_" + "a" * 34, r"line 1 holds what looks like a secret \('hf_aaaaa…'\).*revoke it"),
        (
            "LICENSE",
            "ok\nsee /home/me/models/llama\n",
            r"line 2 holds a path of this machine \('/home/me/models/llama'\)",
        ),
        ("README.md", r"from C:\Users\me\models", r"holds a path of this machine \('C:\\Users\\me\\models'\)"),
    ],
)
def test_what_was_not_meant_to_be_shared_is_refused(folder, name, content, message):
    """Pickles, stray files, secrets and paths, by name and line."""
    (folder / name).write_text(content, encoding="utf-8")
    with pytest.raises(HubError, match=message):
        check_folder(folder)


def test_a_vocabulary_may_hold_paths_but_no_secrets(folder):
    """``/usr/…`` is a word there."""
    file = folder / "tokenizer.json"
    file.write_text(file.read_text(encoding="utf-8") + "\n/home/me/x\n", encoding="utf-8")
    check_folder(folder)
    file.write_text(file.read_text(encoding="utf-8") + "hf_" + "b" * 34, encoding="utf-8")
    with pytest.raises(HubError, match="secret"):
        check_folder(folder)


def test_paths_become_names_and_nothing_else_changes():
    """Hub ids, URLs, ratios and prose stay."""
    kept = ["owner/name", "https://hf.co/home/x/y", "1/2", "each 5th topic", "a/b/c", "/", 3, None]
    assert without_local_paths(kept) == kept
    assert without_local_paths({"a": ["/tmp/x/notes.md", "text of /home/me/b.txt, all", "~/c/d"]}) == {
        "a": ["notes.md", "text of b.txt, all", "d"]
    }


def test_a_changed_weight_is_found(folder):
    """The recorded fingerprint is another model's then."""
    assert check_loading(folder, read_record(folder)) < 1e-4
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"] * 1.1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ParityError, match=r"does not say what it said when it was made: .* differ by .* nats"):
        check_loading(folder, read_record(folder))


def test_a_model_without_a_fingerprint_is_loaded_all_the_same(folder):
    """As an older recursify leaves it; and what does not load is refused with the reason."""
    update_record(folder, fingerprint=None)
    assert check_loading(folder, read_record(folder)) is None
    (folder / "modeling_recursive.py").write_text("import recursify.errors\n", encoding="utf-8")
    with pytest.raises(ParityError, match="does not load in a fresh process without recursify, as others will"):
        check_loading(folder, read_record(folder))


def test_a_card_of_ones_own_must_be_one(tmp_path):
    """Front matter that is no YAML mapping is refused before the upload."""
    (tmp_path / "good.md").write_text("---\nlicense: mit\n---\n# Mine\n", encoding="utf-8")
    assert read_card(tmp_path / "good.md").startswith("---")
    (tmp_path / "bad.md").write_text("---\n- a\n- b\n---\n", encoding="utf-8")
    with pytest.raises(HubError, match=r"model card '.*bad\.md' cannot be read"):
        read_card(tmp_path / "bad.md")
    with pytest.raises(HubError, match=r"model card '.*none\.md' cannot be read"):
        read_card(tmp_path / "none.md")
