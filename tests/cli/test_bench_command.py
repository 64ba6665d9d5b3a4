"""``recursify bench`` on tiny models: all contestants answer, and what is reported of them."""

import json

import pytest

from helpers.command_line import run
from helpers.tiny_models import convert_tiny
from recursify.modeling import RecursiveForCausalLM


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_llama):
    """A model with exits, and a routed one."""
    folder = tmp_path_factory.mktemp("bench")
    convert_tiny(tiny_llama, folder / "exits", num_recursions=2, lora_rank=4)
    convert_tiny(tiny_llama, folder / "routed", num_recursions=2, lora_rank=4)
    for name in ("exits", "routed"):
        model = RecursiveForCausalLM.from_pretrained(folder / name)
        if name == "exits":
            model.add_exit_heads("shared")
        else:
            model.add_routers("expert_choice")
        model.save_pretrained(folder / name)
    return folder


SHORT = ("--prompt", 8, "--new", 6, "--rounds", 1, "--requests", 2, "--threads", 1)


def bench(capsys, *arguments) -> dict:
    assert run("bench", *arguments, *SHORT, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_all_contestants_answer(models, tiny_llama, capsys, tmp_path):
    """Every row beside generate in the same run; exits beside what is possible; an oracle is called a simulation."""
    more = ("--concurrency", 1, "--concurrency", 3, "--exit", "confidence", "--threshold", 0.0, "--oracle")
    facts = bench(capsys, models / "exits", "--dense", tiny_llama, *more, "--plot", tmp_path / "speeds.svg")
    assert (tmp_path / "speeds.svg").read_text().count("generate") > 0
    names = [
        "generate",
        "generate_batch",
        "engine, full depth",
        "engine, forced exits",
        "engine, forced exits, rows wait",
        "generate, exits by confidence",
        "engine, exits by confidence",
        "engine, exits by an oracle",
        "dense, generate",
        "dense, engine",
    ]
    assert [(row["row"], row["concurrency"]) for row in facts["rows"]] == [
        (name, at) for at in (1, 3) for name in names
    ]
    assert facts["clock"] == "CPU time"
    rows = {row["row"]: row for row in facts["rows"] if row["concurrency"] == 3}
    assert all(row["tokens_per_second"] > 0 for row in rows.values())
    assert rows["generate"]["ratio"] == 1
    assert rows["engine, full depth"]["mean_recursions"] == 2
    assert 1.3 < rows["engine, forced exits"]["mean_recursions"] < 1.8
    assert rows["engine, forced exits"]["block_calls"] <= rows["engine, forced exits, rows wait"]["block_calls"]
    assert rows["engine, exits by confidence"]["mean_recursions"] < 1.5, "all leave but first tokens"
    assert rows["dense, engine"]["mean_recursions"] == 1
    assert {row["implementation"] for name, row in rows.items() if "engine" in name} == {"reference"}
    for name in (name for name in names if name.startswith(("engine, forced", "engine, exits"))):
        assert rows[name]["efficiency"] == pytest.approx(rows[name]["gain"] / rows[name]["ideal_gain"])
    assert [name for name, row in rows.items() if row["is_simulation"]] == ["engine, exits by an oracle"]
    assert all(row["fetches_per_iteration"] <= 2 for row in rows.values() if "fetches_per_iteration" in row)


def test_routed_and_dense_models(models, tiny_llama, capsys):
    """A routed model has one way to go; a dense one is one recursion."""
    facts = bench(capsys, models / "routed", "--concurrency", 2)
    assert [row["row"] for row in facts["rows"]] == ["generate", "engine, routers"]
    facts = bench(capsys, tiny_llama, "--concurrency", 2, "--even")
    assert [row["row"] for row in facts["rows"]] == ["generate", "generate_batch", "engine, full depth"]
    assert facts["new_tokens"] == [4 * 6]


def test_table(models, capsys):
    assert run("bench", models / "exits", *SHORT, "--concurrency", 2, "--forced", 0.9, "--forced", 0.1) == 0
    printed = capsys.readouterr().out
    assert "engine, forced exits, rows wait" in printed
    assert "G is the gain over the engine at full depth" in " ".join(printed.split())


@pytest.mark.parametrize(
    ("model", "arguments", "code", "message"),
    [
        ("exits", ("--forced", 0.5), 1, "forced has 1 fractions; the model has 2 recursions"),
        ("exits", ("--forced", 0.5, "--forced", 0.6), 1, "must add up to 1"),
        ("exits", ("--exit", "never"), 1, "Unknown exit policy 'never'"),
        ("routed", ("--exit", "confidence"), 1, "The model has no exits"),
        (
            "exits",
            ("--concurrency", 0),
            1,
            "--concurrency must be a list whose entries are each a whole number of at least 1",
        ),
        ("exits", ("--kv", "best"), 1, "Unknown kv 'best'"),
    ],
)
def test_wrong_benches(models, capsys, model, arguments, code, message):
    assert run("bench", models / model, *SHORT, *arguments) == code
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
