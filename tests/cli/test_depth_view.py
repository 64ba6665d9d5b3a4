"""Tokens coloured by depth: on a terminal, as a page, and raw."""

from __future__ import annotations

import io
import json
from html.parser import HTMLParser

import pytest
import torch
from rich.console import Console

from helpers.command_line import run
from helpers.tiny_models import byte_tokenizer, convert_tiny, save_tiny
from recursify.cli.depth_view import DEEP, SHALLOW, DepthView
from recursify.evaluation.generation import token_pieces
from recursify.modeling import RecursiveForCausalLM

VIEW = DepthView("<a> & ", ["one", " <b>", "", "two"], [0, 2, -1, 2], 3)


@pytest.fixture(scope="module")
def routed(tmp_path_factory):
    """A folder with a routed model whose tokens go different ways, and one without routers."""
    folder = tmp_path_factory.mktemp("depths")
    save_tiny(folder / "dense")
    model = convert_tiny(folder / "dense", folder / "recursive", num_recursions=2)
    model.add_routers("expert_choice")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for router in model.model.routers:
            router.weight.copy_(torch.randn(router.weight.shape, generator=generator))
    model.save_pretrained(folder / "routed")
    byte_tokenizer().save_pretrained(folder / "routed")
    return folder


def test_counts_name_every_depth():
    """Also one that no token was read at; tokens that no recursion ran for come first."""
    assert VIEW.counts() == {-1: 1, 0: 1, 1: 0, 2: 2}


def test_terminal_has_colours_and_a_legend():
    """Blue for the first depth, orange for the last; the text is whole."""
    screen = io.StringIO()
    Console(file=screen, force_terminal=True, color_system="truecolor", width=200).print(VIEW.for_terminal())
    shown = screen.getvalue()
    for colour, piece in ((SHALLOW, "one"), (DEEP, " <b>")):
        assert f"\x1b[38;2;{colour[0]};{colour[1]};{colour[2]}m{piece}" in shown
    assert VIEW.for_terminal().plain.startswith("<a> & one <b>two\n\n")
    assert "depth 1 0" in VIEW.for_terminal().plain


def test_page_is_whole(tmp_path):
    """What a browser shows is the text, whatever signs are in it; each token is named with its depth."""
    VIEW.write_page(tmp_path / "page.html")

    class Reader(HTMLParser):
        text, titles, reads = "", (), False

        def handle_starttag(self, tag, attributes):
            self.reads = self.reads or tag == "p"
            self.titles += tuple(value for name, value in attributes if name == "title")

        def handle_data(self, data):
            self.text += data if self.reads else ""

    reader = Reader()
    reader.feed((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert reader.text.strip() == "<a> & one <b>two"
    assert reader.titles == ("depth 0", "depth 2", "no recursion", "depth 2")


def test_pieces_are_the_whole_text():
    """A character of several tokens comes with the last of them."""
    tokenizer = byte_tokenizer()
    ids = tokenizer("aé漢b", add_special_tokens=False)["input_ids"]
    pieces = token_pieces(tokenizer, ids)
    assert pieces == ["a", "", "é", "", "", "漢", "b"]


def test_generate_shows_depths(routed, tmp_path, capsys):
    """Depths in JSON are those of the tokens before, by the model's own forward; colours do not change the text."""
    prompt = ("generate", routed / "routed", "abcdefgh", "--max-new-tokens", 20)
    assert run(*prompt) == 0
    plain = capsys.readouterr().out
    assert run(*prompt, "--json", "--show-depth", "--depth-page", tmp_path / "depths.html") == 0
    facts = json.loads(capsys.readouterr().out)
    assert "".join(facts["tokens"]) == facts["text"]
    assert set(facts["depths"]) == {0, 1}
    assert (tmp_path / "depths.html").read_text(encoding="utf-8").count('title="depth 1"') == facts["depths"].count(1)

    model = RecursiveForCausalLM.from_pretrained(routed / "routed").eval()
    ids = byte_tokenizer()("abcdefgh", return_tensors="pt")["input_ids"]
    whole = model.generate(ids, max_new_tokens=20, do_sample=False)
    with torch.no_grad():
        depths = model.model(whole, use_cache=False).routing.depths[0]
    assert facts["depths"] == depths[ids.shape[1] - 1 : -1].tolist()

    assert run(*prompt, "--show-depth", "--stats") == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(plain.rstrip("\n"))
    assert "depth 0" in captured.out
    assert f"recursions {1 + sum(facts['depths']) / 20:.2f} per token" in captured.err


def test_generate_shows_exits(routed, capsys):
    """The same of an exit policy; a model without either has one depth."""
    prompt = ("generate", routed / "recursive", "abc", "--max-new-tokens", 20, "--json")
    assert run(*prompt, "--exit", "confidence", "--threshold", 0.02) == 0
    depths = json.loads(capsys.readouterr().out)["depths"]
    assert depths[0] == 1, "the first token is the prompt's"
    assert set(depths) == {0, 1}
    assert run(*prompt) == 0
    assert json.loads(capsys.readouterr().out)["depths"] == [1] * 20


def test_what_has_no_depths_is_refused(routed, tmp_path, capsys):
    """A dense model, speculation, a missing folder, and exits of a routed model."""
    assert run("generate", routed / "dense", "abc", "--show-depth") == 1
    assert "is a dense model, and this needs a recursive one" in capsys.readouterr().err
    assert run("generate", routed / "recursive", "abc", "--show-depth", "--speculate") == 2
    page = tmp_path / "missing" / "page.html"
    assert run("generate", routed / "recursive", "abc", "--max-new-tokens", 2, "--depth-page", page) == 1
    assert "No such file or directory. Use another file name" in capsys.readouterr().err
    assert run("generate", routed / "routed", "abc", "--exit", "confidence") == 1
    assert "The model has routers, which decide" in capsys.readouterr().err
