"""The documentation against the code: its commands and Python run on small models, its links lead somewhere."""

from __future__ import annotations

import importlib
import io
import itertools
import os
import re
import runpy
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import typer.main
from peft import PeftModel
from transformers import AutoTokenizer

from helpers.command_line import run
from helpers.gguf_files import byte_level_keys, write_gguf
from helpers.pages import (
    DOCS,
    PAGES,
    REPOSITORY,
    ROOT,
    Block,
    Command,
    anchors,
    apply_diff,
    blocks,
    commands,
    commands_in,
    links,
    named,
    navigation,
    prose,
    spans,
)
from helpers.running import running
from helpers.tiny_models import convert_tiny, save_multimodal, save_tiny, tiny_dense
from recursify.checkpoint.loading import load_model
from recursify.cli.app import app
from recursify.convert.initialization import INITIALIZATIONS
from recursify.convert.pipeline import convert_model
from recursify.convert.relaxation import RELAXATIONS
from recursify.engine import Engine, SamplingParams
from recursify.modeling import EXIT_POLICIES, RecursiveForCausalLM, make_policy
from recursify.server.engine_process import EngineInfo
from recursify.server.sampling import SamplingParamsBuilder
from recursify.server.settings import ServerSettings
from recursify.uptrain.run import STAGES, uptrain_model
from recursify.uptrain.settings import UptrainSettings

pytestmark = pytest.mark.xdist_group("docs")

DENSE = "smollm2-135m"
NAMES = {DENSE: f"tiny-{DENSE}", "arc_easy": "my_task", "hellaswag": "my_task"}
"""What is at hand only on the network or is large -> what stands in for it."""

CHAINED = (ROOT / "README.md", DOCS / "quickstart.md")
"""Pages that begin with a dense model: no folder is there that a command has not made before."""

SHORT = {
    "convert": ["--calibration-tokens", 1024],
    "plan": ["--calibration-tokens", 1024],
    "uptrain": ["--max-tokens", 256, "--length", 64, "--batch-size", 2],
    "perplexity": ["--max-tokens", 512],
    "generate": ["--max-new-tokens", 4],
    "chat": ["--max-tokens", 4],
    "eval": ["--limit", 2],
    "push": ["--dry-run"],
    "bench": ["--new", 3, "--prompt", 4, "--rounds", 1, "--requests", 1],
}
"""Appended to a command: the last of two equal options counts."""

DOCUMENTED = re.compile(r"^::: (.+)$", re.M)
"""What a reference page is made of."""

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SENTENCES = ["The cat sat on the mat.", "A dog ran after the cat.", "The mat was red, and the cat was not."]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Path:
    """Every folder and file that a page names, made of ten small layers and a few sentences."""
    home = tmp_path_factory.mktemp("workshop")
    sizes = {"num_hidden_layers": 10, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    ends = {"num_prelude_layers": 4, "num_coda_layers": 4}
    save_multimodal(home / "gemma-3-4b-it")
    for name, family in ((NAMES[DENSE], "llama"), ("Llama-3.2-1B", "llama"), ("Qwen3-0.6B", "qwen3")):
        save_tiny(home / name, family, max_position_embeddings=2048, **sizes)
        tokenizer = AutoTokenizer.from_pretrained(home / name)
        tokenizer.eos_token = "<s>"  # TRL wants one
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(home / name)
    shutil.copytree(home / "Qwen3-0.6B", home / "Qwen" / "Qwen3-0.6B")
    tokenizer_keys = byte_level_keys("llama-bpe")
    small = tiny_dense("llama", vocab_size=len(tokenizer_keys["tokenizer.ggml.tokens"]), **sizes)
    write_gguf(home / "Llama-3.2-1B-Instruct-Q8_0.gguf", small, tokenizer=tokenizer_keys, quantization="Q8_0")
    model = convert_tiny(home / NAMES[DENSE], home / "smollm2-r2", lora_rank=4, **ends)
    for name in ("smollm2-healed", "smollm2-exits", "me/smollm2-recursive"):
        shutil.copytree(home / "smollm2-r2", home / name)
    model.add_exit_heads("norm")
    model.save_pretrained(home / "smollm2-exits")
    convert_tiny(home / "Llama-3.2-1B", home / "llama-r2", lora_rank=4)
    convert_tiny(home / "Llama-3.2-1B", home / "llama-cycle", lora_rank=4, sharing="cycle")
    convert_tiny(home / "Qwen3-0.6B", home / "qwen-r4", lora_rank=4, num_recursions=4)
    assert run("export", home / "smollm2-r2", "-o", home / "smollm2-dense", "--no-check") == 0
    assert run("export", home / "llama-cycle", "-o", home / "llama-peft", "--format", "peft", "--no-check") == 0
    write_texts(home)
    return home


def write_texts(home: Path) -> None:
    """The user's texts, and the files that pages show."""
    text = "\n\n".join(SENTENCES * 20)
    for name in ("notes.md", "notes/one.md", "corpus/one.txt", "held_out.txt", "roneneldan/TinyStories/one.txt"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(text, encoding="utf-8")
    row = '{"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because it is."}]}\n'
    (home / "chats.jsonl").write_text(row * 40, encoding="utf-8")
    for page in PAGES:
        for block in blocks(page):
            if block.title:
                (home / block.title).parent.mkdir(parents=True, exist_ok=True)
                (home / block.title).write_text(block.text, encoding="utf-8")


@pytest.fixture
def desk(workshop, tmp_path, monkeypatch) -> Path:
    """A copy of the workshop as the working directory, where code that models bring along is kept too."""
    folder = tmp_path / "desk"
    shutil.copytree(workshop, folder)
    monkeypatch.chdir(folder)
    modules = tmp_path / "modules"
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(modules))
    monkeypatch.setattr("sys.path", [*sys.path, str(modules)])
    return folder


@pytest.fixture
def registries() -> Iterator[None]:
    """What a page registers is gone afterwards."""
    before = [(registry, dict(registry)) for registry in (INITIALIZATIONS, RELAXATIONS, STAGES, EXIT_POLICIES)]
    yield
    for registry, entries in before:
        registry.clear()
        registry.update(entries)


GROUP = typer.main.get_command(app)


def parse(arguments: tuple[str, ...]) -> None:
    """Have typer read ``arguments`` and run nothing; what it refuses is an exception."""
    name, *rest = arguments
    assert name in GROUP.commands, f"there is no command '{name}'"
    GROUP.commands[name].make_context(name, rest)


def flows() -> dict[Path, list[Command]]:
    """Page -> its commands that are run: all of a chained page, and of the others those that no page before has."""
    seen, chosen = set(), {}
    for page in [*CHAINED, *(page for page in PAGES if page not in CHAINED)]:
        for command in commands(page):
            if command.launched or is_placeholder(command) or (command.flow in seen and page not in CHAINED):
                continue
            seen.add(command.flow)
            chosen.setdefault(page, []).append(command)
    return chosen


def is_placeholder(command: Command) -> bool:
    """Whether a page that describes, and does not show, has ``DIR`` for a name."""
    return "DIR" in command.arguments


def test_there_is_something_to_test():
    """The collectors below find what a reader sees."""
    found = [command for page in PAGES for command in commands(page)]
    assert {command.arguments[0] for command in found} == set(GROUP.commands)
    assert any(command.piped == "def fibonacci(n):" for command in found)
    assert any(command.launched for command in found)
    assert sum(map(len, flows().values())) > 20
    assert set(CHAINED) <= set(flows())


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page) or spans(page)], ids=named)
def test_commands_parse(page):
    """Every command of a page exists, with every option, and so does every one in its running text."""
    for command in commands(page):
        parse(command.arguments)
    for span in spans(page):
        words = span.split()
        if len(words) == 1 or words[1].startswith("-"):
            continue
        if len(words) == 2:
            assert words[1] in GROUP.commands, span
        else:
            parse(tuple(word.strip('"') for word in words[1:]))


def test_examples_of_help_parse():
    """The same of what ``--help`` shows."""
    found = []
    for name in GROUP.commands:
        text = importlib.import_module(f"recursify.cli.{name.replace('-', '_')}").HELP
        for line in re.findall(r"^`(.+)`$", text, re.M):
            found += commands_in(line, name)
    for command in found:
        parse(command.arguments)
    assert len(found) > 20


@pytest.mark.parametrize(
    ("page", "names"),
    [
        *((DOCS / "howto" / f"{name}.md", (name,)) for name in ("convert", "uptrain", "eval", "push", "export")),
        (DOCS / "howto" / "look.md", ("inspect", "perplexity", "generate")),
        (DOCS / "howto" / "engine.md", ("bench",)),
        (DOCS / "howto" / "serve.md", ("serve", "chat")),
    ],
    ids=lambda value: value.stem if isinstance(value, Path) else "",
)
def test_options_that_a_page_names_exist(page, names):
    """Of the commands that the page is about; a few of others are mentioned beside them."""
    parameters = [parameter for name in names for parameter in GROUP.commands[name].load().params]
    known = {option for parameter in parameters for option in (*parameter.opts, *parameter.secondary_opts)}
    elsewhere = {"--dry-run", "--prelude", "--coda", "--init", "--help"}
    mentioned = set(re.findall(r"`(--[a-z][a-z-]*)", prose(page)))
    assert mentioned or page.stem == "export"
    assert mentioned <= known | elsewhere, mentioned - known


@pytest.mark.parametrize("page", list(flows()), ids=named)
def test_commands_run(page, desk, monkeypatch, capsys):
    """What a page says to type works, in its order; training, measuring and uploading cut short."""
    if page in CHAINED:
        for record in list(desk.rglob("recursify.json")):
            shutil.rmtree(record.parent)
    for command in flows()[page]:
        arguments = [NAMES.get(word, word) for word in command.arguments]
        name, output = arguments[0], output_of(arguments)
        arguments += SHORT.get(name, [])
        if name == "uptrain" and "--data" not in arguments and "--config" not in arguments:
            arguments += ["--data", "notes.md"]
        if name == "eval" and "--include-path" not in arguments:
            arguments += ["--include-path", "tasks"]
        if output and (desk / output).exists() and not {"--resume", "--overwrite"} & set(arguments):
            arguments.append("--overwrite")
        if name == "convert" and page not in CHAINED:
            arguments.append("--no-check")
        if name == "push" and page not in CHAINED:
            # The fresh process takes seconds; once is enough.
            monkeypatch.setattr("recursify.hub.publication.check_loading", lambda folder, record: None)
        if name == "serve":
            monkeypatch.setattr("recursify.server.uvicorn_server.run_server", serve_once)
        monkeypatch.setattr("sys.stdin", io.StringIO(command.piped or ("Why?" if name == "chat" else "")))
        code = run(*arguments)
        printed = capsys.readouterr()
        assert code == 0, f"{command}\n{printed.err}"
        assert printed.out.strip(), command
        if output and "--dry-run" not in arguments:
            assert (desk / output / "config.json").exists(), command


def serve_once(build: Callable[[], Engine], settings: ServerSettings, *, host: str, port: int) -> None:
    """Do what ``run_server`` does, up to the point where it would wait for requests."""
    builder = SamplingParamsBuilder(settings, EngineInfo.of(engine := build()))
    params = SamplingParams(max_tokens=2, **builder.exit_parameters(builder.default_exit))
    print(engine.generate(["Why?"], params)[0].text, host, port)


def output_of(arguments: list[str]) -> str | None:
    """The folder that a command writes."""
    pairs = itertools.pairwise(arguments)
    return next((after for word, after in pairs if word in ("-o", "--output")), None)


@pytest.mark.parametrize("page", [page for page in PAGES[1:] if blocks(page, "python")], ids=named)
def test_python_runs(page, desk, registries, capsys):
    """The Python of a page, from top to bottom as one program; where it asks a server, there is one.

    That of README is run by ``tests/test_front_door.py``.
    """
    namespace: dict[str, object] = {}
    asks = any(SERVER in block.text for block in blocks(page, "python"))
    with running(exits_engine, model_name="smollm2-exits") if asks else nullcontext() as server:
        for block in blocks(page, "python"):
            execute(block, namespace, server.url if server else SERVER)


SERVER = "http://127.0.0.1:8000"


def exits_engine() -> Engine:
    """The one that the page has served."""
    return Engine(*load_model("smollm2-exits"), max_num_seqs=2)


def execute(block: Block, namespace: dict[str, object], server: str = SERVER) -> None:
    text = block.text.replace(f'"{DENSE}"', f'"{NAMES[DENSE]}"').replace(SERVER, server)
    exec(compile("\n" * (block.line - 1) + text, str(block.page), "exec"), namespace)


def test_what_extend_registers_can_be_used(desk, registries):
    """Also by name, as settings have it: the residuals and the loss that the page only defines."""
    namespace: dict[str, object] = {}
    for block in blocks(DOCS / "extend.md", "python"):
        if "RELAXATIONS[" in block.text or "STAGES[" in block.text:
            execute(block, namespace)
    settings = {"initialization": "average", "relaxation": "low_rows", "lora_rank": 4, "calibration_data": []}
    convert_model(NAMES[DENSE], "rows", check=False, **settings)
    model = RecursiveForCausalLM.from_pretrained("rows")
    factors = model.model.block[0].self_attn.q_proj
    assert factors.lora_b[0].sum() == 4
    short = UptrainSettings(stage="imitating_exits", data=("notes.md",), max_tokens=256, length=64, batch_size=2)
    outcome = uptrain_model(Path("rows"), Path("imitating"), settings=short)
    assert "perplexity_depth_0" in outcome.after


def test_the_exit_policy_of_extend_decides(desk, registries):
    """At a threshold that its confidence is always above, every token exits; at 1 none does."""
    namespace: dict[str, object] = {}
    for block in blocks(DOCS / "extend.md", "python"):
        if "EXIT_POLICIES[" in block.text:
            execute(block, namespace)
    model = RecursiveForCausalLM.from_pretrained("smollm2-exits")
    ids = torch.tensor([[5, 6, 7]])
    for threshold, exits in ((0.0, 0), (1.0, 1)):
        policy = make_policy("odds", threshold)
        found = model.generate(ids, max_new_tokens=5, do_sample=False, exit_policy=policy, return_dict_in_generate=True)
        assert found.exit_depths[0, 1:].tolist() == [exits] * 4


def test_changes_that_extend_shows_fit_the_code(monkeypatch):
    """Each is applied to the files as they are, and does what the page says."""
    changed = {}
    for block in blocks(DOCS / "extend.md", "diff"):
        changed |= apply_diff(block.text)
    assert len(changed) == 6
    for name, text in changed.items():
        compile(text, name, "exec")
    layout = load_changed(monkeypatch, changed, "src/recursify/modeling/recursive_layout.py").LayerLayout
    assert layout.fold(10, 2, "wide_cycle") == layout.fold(10, 2, "cycle", num_prelude_layers=2, num_coda_layers=2)
    assert layout.fold(10, 2, "middle_cycle").num_prelude_layers == 1
    settings = load_changed(monkeypatch, changed, "src/recursify/uptrain/settings.py").UptrainSettings
    assert settings(stage="exits", exit_loss="halving").exit_loss == "halving"


def load_changed(monkeypatch, changed: dict[str, str], name: str) -> types.ModuleType:
    """A module of changed text, beside the package."""
    module = types.ModuleType(f"changed_{Path(name).stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look their module up
    exec(compile(changed[name], name, "exec"), module.__dict__)
    return module


@pytest.mark.parametrize("page", [page for page in PAGES if links(page)], ids=named)
def test_links_resolve(page):
    """Files, headings of pages, documented names, and files that are linked by their address in the repository."""
    for target in links(page):
        path, _, anchor = target.partition("#")
        if path.startswith(f"{REPOSITORY}/blob/main/"):
            path = os.path.relpath(ROOT / path.removeprefix(f"{REPOSITORY}/blob/main/"), page.parent)
        elif path == REPOSITORY:
            path = os.path.relpath(ROOT / "README.md", page.parent)
        elif re.match(r"\w+:", path):
            continue
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{named(page)}: {target}"
        if anchor.startswith("recursify."):
            module, _, name = anchor.rpartition(".")
            assert {anchor, module} & set(DOCUMENTED.findall(file.read_text(encoding="utf-8"))), target
            assert hasattr(importlib.import_module(module), name), f"{named(page)}: {target}"
        elif anchor:
            assert anchor in anchors(file), f"{named(page)}: {target}"


def test_every_page_is_in_the_navigation():
    """And every entry of the navigation is a page; the site's own build does not look."""
    assert sorted(navigation()) == sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))


def test_every_picture_is_shown():
    """And none is shown that is not there."""
    shown = {
        (page.parent / target).resolve()
        for page in PAGES
        for target in links(page)
        if target.endswith((".svg", ".png"))
    }
    assert shown == set((DOCS / "pictures").iterdir())


def test_every_documented_name_exists():
    """What the reference pages are made of."""
    names = [name for page in (DOCS / "reference").glob("*.md") for name in DOCUMENTED.findall(prose(page))]
    assert len(names) > 40
    assert len(names) == len(set(names))
    for name in names:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute) or importlib.util.find_spec(name), name


def test_results_are_taken_in_whole():
    """Every page that a benchmark wrote is on the site; where its heading is left out, the same stands before it."""
    taken_in = set()
    for page in (DOCS / "results.md", DOCS / "samples.md"):
        heading = None
        for line in page.read_text(encoding="utf-8").splitlines():
            if line.startswith("## "):
                heading = line.removeprefix("## ")
            elif found := re.fullmatch(r'--8<-- "([^":]+)(:2)?"', line):
                first = (ROOT / found[1]).read_text(encoding="utf-8").splitlines()[0]
                assert first == f"# {heading}" if found[2] else first.startswith("# "), found[1]
                taken_in.add(found[1])
    results = (ROOT / "benchmarks" / "results").glob("*.md")
    assert taken_in == {file.relative_to(ROOT).as_posix() for file in results}


def test_example_generates_at_every_depth(desk, monkeypatch, capsys):
    """``examples/load_and_generate.py``."""
    example(monkeypatch, "load_and_generate.py", "smollm2-exits", "--max-new-tokens", "3")
    out = capsys.readouterr().out
    assert "9 layers stored, 10 run: 4 + (1 layers × 2) + 4" in out
    assert out.count("Once upon a time") == 2
    assert "[exit after depth 0]" in out


def test_example_trains_an_adapter(desk, monkeypatch, capsys):
    """``examples/finetune_with_lora.py``: what it saves loads, and changes the model."""
    example(monkeypatch, "finetune_with_lora.py", "smollm2-r2", "--data", "notes.md", "--max-steps", "2")
    assert "trainable params" in capsys.readouterr().out
    model = RecursiveForCausalLM.from_pretrained("smollm2-r2")
    adapted = PeftModel.from_pretrained(model, "adapter")
    weights = [parameter for name, parameter in adapted.named_parameters() if "lora_B" in name]
    assert len(weights) == 2 * (4 + 1 + 4)
    assert all(weight.abs().max() > 0 for weight in weights)


def test_demo_prints_one_table(desk):
    """``examples/demo.py``: four rows, a line for each on stderr, and nothing of other libraries."""
    command = [sys.executable, str(ROOT / "examples" / "demo.py"), "--model", NAMES[DENSE], "--output", "kept"]
    printed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert printed.returncode == 0, printed.stderr
    titles = ["dense", "published (average + SVD)", "calibrated", "uptrained, 4,096 tokens"]
    for title in titles:
        assert printed.stdout.count(f"\n[{title}] The three primary colors are") == 1
        (line,) = [line for line in printed.stdout.splitlines() if line.startswith(f"{title}  ")]
        numbers = line.removeprefix(title).split()
        assert float(numbers[-1]) > 0
        assert len(numbers) == (5 if title == "dense" else 7)
    lines = [line for line in printed.stderr.splitlines() if "new PAD/BOS/EOS tokens" not in line]
    assert [line.partition(": done")[0] for line in lines] == [*titles, "speed"]
    assert (desk / "kept" / "recursify.json").exists()


def example(monkeypatch, name: str, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", [name, *arguments])
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
