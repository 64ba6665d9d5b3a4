"""A routed model from the shell: trained, inspected, and refused where routers have no place."""

from __future__ import annotations

import json

import pytest

from helpers.command_line import run
from helpers.tiny_models import convert_tiny, save_tiny
from recursify.modeling import RecursiveForCausalLM

pytestmark = pytest.mark.xdist_group("uptraining")


@pytest.fixture(scope="module")
def routed(tmp_path_factory):
    """What ``uptrain --stage routers`` writes."""
    folder = tmp_path_factory.mktemp("routed")
    save_tiny(folder / "dense")
    convert_tiny(folder / "dense", folder / "recursive", num_recursions=2)
    (folder / "text.txt").write_text("The cat sat on the mat. " * 100, encoding="utf-8")
    short = ["--data", folder / "text.txt", "--max-tokens", 512, "--length", 64, "--batch-size", 2, "--kl-weight", 0]
    chosen = ["--stage", "routers", "--capacity", 1, "--capacity", 0.25, "--router-kv", "shared"]
    assert run("uptrain", folder / "recursive", "-o", folder / "routed", *short, *chosen) == 0
    return folder


def test_uptrain_takes_router_options(routed, capsys):
    """Flags become the model's config; the summary says what each recursion takes."""
    config = RecursiveForCausalLM.from_pretrained(routed / "routed").config
    assert (config.router, config.router_capacities, config.router_kv) == ("expert_choice", [1.0, 0.25], "shared")
    short = ["--data", routed / "text.txt", "--max-tokens", 128, "--length", 64, "--batch-size", 2, "--kl-weight", 0]
    more = ["--stage", "routers", "--router", "token_choice"]
    assert run("uptrain", routed / "recursive", "-o", routed / "chosen", *short, *more) == 0
    out = capsys.readouterr().out
    assert "top-k accuracy" in out
    assert "per token, of 2" in out
    assert run("uptrain", routed / "recursive", "-o", routed / "bad", *short, *more, "--capacity", 1) == 1
    assert "in token_choice every token chooses" in capsys.readouterr().err


def test_inspect_tells_of_routers(routed, capsys):
    """Who chooses, what each recursion takes, and how many parameters that is."""
    assert run("inspect", routed / "routed") == 0
    assert "routers   expert_choice, running 100%, 25% of the tokens; KV cache shared" in (capsys.readouterr().out)
    assert run("inspect", routed / "routed", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["parameters"]["routers"] == 2 * 32
    assert facts["routing"]["capacities"] == [1.0, 0.25]
    assert run("inspect", routed / "recursive", "--json") == 0
    assert json.loads(capsys.readouterr().out)["routing"] is None


@pytest.mark.parametrize("form", ["dense", "peft"])
def test_export_refuses_routers(routed, form, capsys):
    """A stock model processes every token."""
    assert run("export", routed / "routed", "-o", routed / "out", "--format", form) == 1
    assert "has expert_choice routers, and stock layers process every token" in capsys.readouterr().err


def test_perplexity_of_a_routed_model(routed, capsys):
    """It is that of inference."""
    assert run("perplexity", routed / "routed", "--data", routed / "text.txt", "--length", 64, "--json") == 0
    assert json.loads(capsys.readouterr().out)["perplexity"] > 1
