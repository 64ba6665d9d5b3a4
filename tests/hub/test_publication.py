"""Checks of a folder before it is uploaded: it loads, reproduces its fingerprint, and contains nothing else."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file, save_file

from recursify.checkpoint.record import read_record, update_record
from recursify.errors import HubError, ParityError
from recursify.hub.publication import (
    check_folder,
    check_loading,
    read_card,
    refuse_private,
    stage_publication,
    without_local_paths,
)
from recursify.modeling import RecursiveConfig, travelling_files


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
    assert set(travelling_files(RecursiveConfig.from_pretrained(trained))) <= names
    assert publication.left_out == ["checkpoints"]
    assert publication.sizes["model.safetensors"] == (trained / "model.safetensors").stat().st_size
    assert publication.difference is not None
    assert publication.difference < 1e-4
    run = json.loads((stage / "recursify.json").read_text(encoding="utf-8"))["history"][0]
    assert run["data_name"] == "notes"
    assert run["settings"]["data"] == ["notes", "owner/stories"]
    assert read_record(trained)["history"][0]["data_name"] == "/home/me/notes"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pytorch_model.bin", "is a pickle, which can run any code when it is loaded.* move it out"),
        ("notes.docx", "is not part of a recursive model. Move it out of the folder"),
        ("tokenizer_backup.zip", "is not part of a recursive model"),
        ("optimizer.safetensors", "is not part of a recursive model"),
        ("additional_chat_templates/id_rsa", "is not part of a recursive model"),
        ("LICENSE/secrets.env", "is not part of a recursive model"),
    ],
)
def test_what_belongs_to_no_model_is_refused(folder, name, message):
    """Pickles and stray files, in folders too."""
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("x", encoding="utf-8")
    with pytest.raises(HubError, match=message):
        check_folder(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("token: hf_" + "a" * 34, r"line 1 contains a likely secret \('hf_aaaaa…'\).*revoke it"),
        ("github_pat_" + "a" * 40, "secret"),
        ("AIza" + "a" * 35, "secret"),
        ("-----BEGIN RSA PRIVATE KEY-----", "secret"),
        ("ok\nsee /home/me/models/llama\n", r"line 2 contains a path of this machine \('/home/me'\)"),
        (r"from C:\Users\me\models", r"contains a path of this machine \('C:\\Users\\me'\)"),
    ],
)
def test_secrets_and_homes_are_refused(tmp_path, text, message):
    """By name and line, in whatever is read by people."""
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    with pytest.raises(HubError, match=message):
        refuse_private(tmp_path / "README.md")


def test_a_card_of_ones_own_is_searched_too(folder, tmp_path):
    """It is not in the folder."""
    stage = tmp_path / "stage"
    stage.mkdir()
    with pytest.raises(HubError, match=r"'README\.md' line 3 contains a likely secret"):
        stage_publication(folder, stage, "# Mine\n\nhf_" + "c" * 34, {})


def test_prose_and_vocabularies_may_name_paths_that_are_nobodys(tmp_path):
    """``/tmp/out`` in a manual, ``/home/…`` as a word of a tokenizer."""
    (tmp_path / "README.md").write_text("cd ~/.cache; ls /tmp/out /mnt/data; GET /data/items\n", encoding="utf-8")
    refuse_private(tmp_path / "README.md")
    (tmp_path / "tokenizer.json").write_text('"/home/me/x"\n', encoding="utf-8")
    refuse_private(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("hf_" + "b" * 34, encoding="utf-8")
    with pytest.raises(HubError, match="secret"):
        refuse_private(tmp_path / "tokenizer.json")


def test_where_a_tokenizer_was_loaded_from_is_left_out(folder, tmp_path):
    """transformers writes it into its config."""
    config = folder / "tokenizer_config.json"
    fields = {**json.loads(config.read_text(encoding="utf-8")), "name_or_path": "/home/me/llama"}
    config.write_text(json.dumps(fields), encoding="utf-8")
    stage = tmp_path / "stage"
    stage.mkdir()
    stage_publication(folder, stage, "# Card\n", {})
    published = json.loads((stage / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert published == {key: value for key, value in fields.items() if key != "name_or_path"}


def test_paths_become_names_and_nothing_else_changes():
    """Hub ids, URLs, ratios and prose stay."""
    kept = ["owner/name", "https://hf.co/home/x/y", "1/2", "each 5th topic", "a/b/c", "GET /items", 3, None]
    assert without_local_paths(kept) == kept
    paths = {
        "/tmp/x/notes.md": "notes.md",
        "text of /home/me/b.txt, all": "text of b.txt, all",
        "~/c/d": "d",
        "/lustre/me/my data/run 1": "run 1",
        "../alice/x": "x",
        "C:/Users/alice/m": "m",
        "file:///home/alice/x": "x",
        "/home/alice": "a local folder",
        "\\\\server\\share\\m": "m",
    }
    assert without_local_paths(list(paths)) == list(paths.values())


def test_a_changed_weight_is_found(folder):
    """The recorded fingerprint is another model's then."""
    assert check_loading(folder, read_record(folder)) < 1e-4
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"] * 1.1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ParityError, match=r"does not reproduce its fingerprint: .* differ by .* nats"):
        check_loading(folder, read_record(folder))


def test_a_fixed_depth_changes_no_fingerprint(folder):
    """It is of all recursions, whatever depth the model is set to run at."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "exit_depth": 0}), encoding="utf-8")
    assert check_loading(folder, read_record(folder)) < 1e-4


def test_a_model_without_a_fingerprint_is_loaded_all_the_same(folder):
    """As an older recursify leaves it; and what does not load is refused with the reason."""
    update_record(folder, fingerprint=None)
    assert check_loading(folder, read_record(folder)) is None
    (folder / "modeling_recursive.py").write_text("import recursify.errors\n", encoding="utf-8")
    with pytest.raises(
        ParityError, match=r"does not load in a fresh process without recursify: .* Nothing was uploaded"
    ):
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
