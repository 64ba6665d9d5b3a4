"""The command line, as a user types it: in process, with what it prints and the code it exits with."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET

import pytest
import torch

from helpers.command_line import run
from helpers.tiny_models import save_tiny
from recursify.cli.app import main
from recursify.modeling import RecursiveForCausalLM

COMMANDS = (
    "plan",
    "convert",
    "uptrain",
    "calibrate-exits",
    "inspect",
    "perplexity",
    "eval",
    "generate",
    "chat",
    "serve",
    "bench",
    "export",
    "push",
)
TINY = ["--lora-rank", "4", "--calibration-data", "none", "--no-check"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with a dense model and a recursive one."""
    folder = tmp_path_factory.mktemp("cli")
    save_tiny(folder / "dense", max_position_embeddings=2048)
    assert run("convert", folder / "dense", "-o", folder / "recursive", *TINY) == 0
    return folder


def test_help_is_instant():
    """``--help`` of every command loads neither torch nor transformers."""
    script = (
        "import sys\nfrom recursify.cli.app import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "heavy = [m for m in ('torch', 'transformers', 'datasets', 'peft', 'numpy', 'fastapi') if m in sys.modules]\n"
        "assert not heavy, heavy\n"
    )
    for command in ([], *([name] for name in COMMANDS)):
        done = subprocess.run([sys.executable, "-c", script, *command, "--help"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "Usage" in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command, capsys):
    """Each command shows how it is used."""
    assert run(command, "--help") == 0
    assert "Examples" in capsys.readouterr().out


def test_version(capsys):
    """``--version`` prints it."""
    assert run("--version") == 0
    assert capsys.readouterr().out.startswith("recursify ")


def test_convert_reports_and_suggests(models, tmp_path, capsys):
    """Figures beside the dense model's, a sample, and the next command, on stdout."""
    arguments = ["--recursions", 1, "--lora-rank", 0, "--calibration-data", "none"]
    assert run("convert", models / "dense", "-o", tmp_path / "out", *arguments) == 0
    out, err = capsys.readouterr()
    assert "agreement   100.0%" in out
    assert f"recursify generate {tmp_path / 'out'}" in out
    assert "parameters" in err
    assert "cost on cpu" in err


def test_convert_json(models, tmp_path, capsys):
    """stdout is one JSON document, with the plan, the record and the check."""
    assert run("convert", models / "dense", "-o", tmp_path / "out", *TINY, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["plan"]["recursive"]["num_parameters"] < facts["plan"]["dense"]["num_parameters"]
    assert facts["output"] == str(tmp_path / "out")


def test_dry_run_writes_nothing(models, tmp_path, capsys):
    """The plan on stdout, as text or JSON."""
    assert run("convert", models / "dense", "--dry-run", *TINY) == 0
    out = capsys.readouterr().out
    assert "1 + (2 layers × 2) + 1" in out
    assert re.search(r"\n  cost on cpu     about \d+ s, \d\.\d GB of memory, 0\.0 GB on disk\n", out)
    assert run("convert", models / "dense", "-o", tmp_path / "out", "--dry-run", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["layout"]["num_recursions"] == 2
    assert plan["costs"][0].keys() == {"device", "seconds", "peak_bytes", "disk_bytes"}
    assert plan["costs"][0]["disk_bytes"] == plan["recursive"]["num_bytes"]
    assert not (tmp_path / "out").exists()


def test_settings_file_and_flags(models, tmp_path, capsys):
    """YAML sets, flags win."""
    settings = tmp_path / "settings.yaml"
    settings.write_text("lora_rank: full\nsharing: cycle\nnum_recursions: 3\nlora_rank_pattern: {mlp.down_proj: 2}\n")
    flags = ["--config", settings, "--recursions", 2, "--dry-run", "--json", "--calibration-data", "none"]
    assert run("convert", models / "dense", *flags) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["layout"]["num_recursions"] == 2
    assert plan["layout"]["prelude"] == []
    assert plan["lora_rank"] == "full"
    assert plan["lora_rank_pattern"] == {"mlp.down_proj": 2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recursions", 4, "--sharing", "cycle"], "Cannot fold 6 layers into 4 recursions.*--recursions 3"),
        (["--recursions", 0], "--recursions must be a whole number of at least 1, got 0"),
        (["--lora-rank", "-1"], "--lora-rank must be a whole number of at least 0, or 'full', got -1"),
        (["--lora-rank", "many"], "--lora-rank must be a whole number of at least 0, or 'full', got 'many'"),
        (["--sharing", "spiral"], "Unknown --sharing 'spiral'. Use one of: cycle, sequence"),
        (
            ["--sharing", "middle_cycle", "--prelude", 2],
            "--sharing middle_cycle already implies one prelude and one coda",
        ),
        (["--init", "mean"], "Unknown initialization 'mean'"),
        (["--relaxation", "pca"], "Unknown relaxation 'pca'"),
        (["--rank-allocation", "best"], "Unknown rank allocation 'best'"),
        (["--dtype", "int4"], "Unknown --dtype 'int4'. Use one of: auto, float32"),
        (["--device", "warp"], "Cannot run on 'warp'"),
        (["--prelude", 3, "--coda", 3], "6 layers less a prelude of 3 and a coda of 3 leave 0"),
        (["--prelude", "-1"], "--prelude must be a whole number of at least 0, got -1"),
        (["--calibration-data", "nowhere.txt"], "There is no text at 'nowhere.txt'"),
        (["--init", "calibrated", "--calibration-data", "none"], "need text to calibrate on"),
    ],
)
def test_wrong_settings_exit_1(models, tmp_path, capsys, arguments, message):
    """One clear line on stderr, nothing on stdout, nothing written."""
    import re

    assert run("convert", models / "dense", "-o", tmp_path / "out", *arguments) == 1
    out, err = capsys.readouterr()
    assert re.search(message, err), err
    assert err.splitlines()[-1].startswith("Error: ")
    assert "Traceback" not in err
    assert out == ""
    assert list(tmp_path.iterdir()) == []


def test_unknown_setting_names_the_nearest(models, tmp_path, capsys):
    """A misspelt key in the file."""
    settings = tmp_path / "settings.yaml"
    settings.write_text("lora_rnk: 3\n")
    assert run("convert", models / "dense", "--dry-run", "--config", settings) == 1
    assert "Unknown key 'lora_rnk'" in (err := capsys.readouterr().err)
    assert "Did you mean 'lora_rank'?" in err


@pytest.mark.parametrize(
    ("content", "message"),
    [("- a\n- b\n", "must contain a mapping of settings, found list"), ("a: [", "Cannot read settings")],
)
def test_damaged_settings(models, tmp_path, capsys, content, message):
    """YAML that is no mapping, or no YAML."""
    (tmp_path / "s.yaml").write_text(content)
    assert run("convert", models / "dense", "--dry-run", "--config", tmp_path / "s.yaml") == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "empty. Give a file with some thousand words"),
        ("binary.txt", b"abc\0def" * 100, "is binary"),
        ("latin.txt", "né".encode("latin-1") * 100, "is not UTF-8"),
        ("short.txt", b"too short", "is too short: 9 tokens"),
        ("rows.jsonl", b'{"text": "a"}\nnot json\n', r"rows.jsonl:2 is not JSON"),
        ("fields.jsonl", b'{"txt": "a"}\n', r"fields.jsonl:1 has no 'text' string .*it has: txt"),
        ("broken.parquet", b"PAR1 no", "cannot be read as Parquet"),
    ],
)
def test_bad_calibration_text(models, tmp_path, capsys, name, content, message):
    """Each with the file and what is wrong in it."""
    import re

    (tmp_path / name).write_bytes(content)
    assert run("convert", models / "dense", "-o", tmp_path / "out", "--calibration-data", tmp_path / name) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_output_exists(models, capsys):
    """Needs ``--overwrite``."""
    assert run("convert", models / "dense", "-o", models / "recursive", *TINY) == 1
    assert "pass --overwrite to replace it" in capsys.readouterr().err
    assert run("convert", models / "dense", "-o", models / "recursive", *TINY, "--overwrite") == 0


def test_output_inside_the_input(models, capsys):
    """Refused before anything is read."""
    assert run("convert", models / "dense", "-o", models / "dense" / "out", *TINY) == 1
    assert "overlap. Choose another -o" in capsys.readouterr().err


def test_usage_exits_2(models, capsys):
    """No output, an unknown option, no command."""
    assert run("convert", models / "dense") == 2
    assert run("convert", models / "dense", "--recursion", 2) == 2
    assert run("convrt") == 2
    capsys.readouterr()


def test_debug_shows_the_traceback(models):
    """``--debug`` lets the error through."""
    from recursify.errors import PlanError

    with pytest.raises(PlanError, match="Unknown initialization"):
        main(["--debug", "convert", str(models / "dense"), "--dry-run", "--init", "mean"])


def test_inspect(models, capsys):
    """Sizes from the headers agree with the model's own."""
    assert run("inspect", models / "recursive", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    model = RecursiveForCausalLM.from_pretrained(models / "recursive")
    assert facts["parameters"]["stored"] == sum(p.numel() for p in model.parameters())
    assert facts["layout"]["layer_to_block"] == [0, 1, 2, 1, 2, 3]
    assert run("inspect", models / "recursive") == 0
    assert "block     2 shared layers × 2: positions 1-4" in capsys.readouterr().out


def test_inspect_plot(models, tmp_path, capsys):
    """A picture in addition to the text; a file that is not an SVG, or whose folder is missing, is refused."""
    file = tmp_path / "layout [1].svg"
    assert run("inspect", models / "recursive", "--json", "--plot", file) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["layout"]["num_recursions"] == 2
    assert f"drew the layout in {file}" in err
    assert ET.parse(file).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    (tmp_path / "folder.svg").mkdir()
    for name, message in (
        ("layout.txt", "Use .png or .svg"),
        ("folder.svg", "Use another file name"),
        ("nowhere/layout.svg", "No such file or directory"),
    ):
        assert run("inspect", models / "recursive", "--plot", tmp_path / name) == 1
        out, err = capsys.readouterr()
        assert message in err
        assert str(tmp_path / name) in err
        assert out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.svg", "layout [1].svg"]


def test_effective_parameters_are_the_unrolled_model_s(models, tmp_path, capsys):
    """What ``inspect`` says it runs as is what ``export`` writes."""
    assert run("export", models / "recursive", "-o", tmp_path / "out", "--json") == 0
    exported = json.loads(capsys.readouterr().out)
    assert run("inspect", models / "recursive", "--json") == 0
    assert exported["bytes"] == 4 * json.loads(capsys.readouterr().out)["parameters"]["effective"]


def test_inspect_what_is_not_recursive(models, capsys):
    """A dense folder, and nothing."""
    assert run("inspect", models / "dense") == 1
    assert "is not a recursive model" in capsys.readouterr().err
    assert run("inspect", models / "nowhere") == 1
    assert "There is no model folder at" in capsys.readouterr().err


def test_perplexity(models, tmp_path, capsys):
    """Of a recursive and a dense model, alone and against each other, on the user's text."""
    (tmp_path / "text.md").write_text("Some words that repeat themselves. " * 60)
    data = ["--data", tmp_path / "text.md", "--length", 64]
    assert run("perplexity", models / "recursive", *data, "--json") == 0
    alone = json.loads(capsys.readouterr().out)
    assert run("perplexity", models / "recursive", *data, "--against", models / "dense", "--json") == 0
    both = json.loads(capsys.readouterr().out)
    assert both["model"]["perplexity"] == pytest.approx(alone["perplexity"], rel=1e-5)
    assert 0 <= both["top1_agreement"] <= 1
    assert both["kl"] > 0
    assert run("perplexity", models / "dense", *data, "--against", models / "dense") == 0
    assert "same argmax 100.0%" in capsys.readouterr().out
    assert run("perplexity", models / "recursive", *data, "--depth", 0, "--json") == 0
    shallow = json.loads(capsys.readouterr().out)
    assert shallow["depth"] == 0
    assert shallow["perplexity"] != alone["perplexity"]
    assert run("perplexity", models / "dense", *data, "--depth", 0) == 1
    assert "has no exits" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "int4"], "Unknown --dtype 'int4'. Use one of: auto, float32"),
        (["--device", "warp"], "Cannot run on 'warp'"),
        (["--length", 10**6], "is too short"),
        (["--depth", 1], "has exits after depths 0, so none at --depth 1"),
    ],
)
def test_perplexity_with_wrong_values(models, capsys, arguments, message):
    """One clear line each."""
    assert run("perplexity", models / "recursive", *arguments) == 1
    assert message in capsys.readouterr().err


def test_other_numbers_of_recursions(models, capsys):
    """As many as there are change nothing; others do, by the scale, too, and are said in JSON."""
    measured = []
    for extra in ([], ["--recursions", 2], ["--recursions", 1], ["--recursions", 1, "--residual-scale", 1]):
        assert run("perplexity", models / "recursive", "--max-tokens", 1024, *extra, "--json") == 0
        measured.append(json.loads(capsys.readouterr().out))
    assert "recursions" not in measured[0]
    assert [facts["residual_scale"] for facts in measured[1:]] == [1, 2, 1]
    figures = [facts["perplexity"] for facts in measured]
    assert figures[0] == figures[1]
    assert len(set(figures)) == 3
    prompt = ("generate", models / "recursive", "abc", "--max-new-tokens", 6)
    assert run(*prompt) == 0
    whole = capsys.readouterr().out
    assert run(*prompt, "--recursions", 2) == 0
    assert capsys.readouterr().out == whole
    assert run(*prompt, "--recursions", 4, "--anderson", 2) == 0
    assert capsys.readouterr().out != whole


@pytest.mark.parametrize(
    ("command", "model", "arguments", "code", "message"),
    [
        (("perplexity",), "recursive", ("--recursions", 2, "--depth", 0), 1, "--depth is one of the model's own"),
        (("perplexity",), "recursive", ("--residual-scale", 2), 1, "--residual-scale requires --recursions"),
        (("generate", "abc"), "recursive", ("--anderson", 2), 1, "--anderson requires --recursions"),
        (
            ("perplexity",),
            "recursive",
            ("--recursions", 0),
            1,
            "--recursions must be a whole number of at least 1, got 0",
        ),
        (("perplexity",), "dense", ("--recursions", 2), 1, "is a dense model, and this needs a recursive one"),
        (
            ("perplexity",),
            "recursive",
            ("--recursions", 2, "--residual-scale", -1),
            1,
            "residual_scale must be a positive number, got -1.0",
        ),
        (("generate", "abc"), "recursive", ("--recursions", 2, "--anderson", 2), 1, "of 2 recursions none does"),
        (
            ("generate", "abc"),
            "recursive",
            ("--recursions", 4, "--anderson", 2, "--exit", "confidence"),
            1,
            "The model mixes loops (anderson=2)",
        ),
    ],
)
def test_other_numbers_of_recursions_that_cannot_be(models, capsys, command, model, arguments, code, message):
    """One clear line each."""
    name, *rest = command
    assert run(name, models / model, *rest, *arguments) == code
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_generate(models, capsys, monkeypatch):
    """The prompt and what follows; seeded sampling; JSON; a chat template that is not there."""
    assert run("generate", models / "recursive", "abc", "--max-new-tokens", 5) == 0
    assert capsys.readouterr().out.startswith("abc")
    sampled = []
    for _ in range(2):
        arguments = ["--max-new-tokens", 6, "--temperature", 1.0, "--seed", 3, "--json"]
        assert run("generate", models / "recursive", "abc", *arguments) == 0
        sampled.append(json.loads(capsys.readouterr().out))
    assert sampled[0]["text"] == sampled[1]["text"]
    assert sampled[0]["num_tokens"] == 6
    assert run("generate", models / "recursive", "abc", "--chat") == 1
    assert "The model has no chat template" in capsys.readouterr().err
    assert run("generate", models / "recursive", "") == 2


def test_generate_with_early_exits(models, tmp_path, capsys):
    """Where tokens left, what it cost, whether the whole model agrees; and an oracle is called a simulation."""
    prompt = ("generate", models / "recursive", "abc", "--max-new-tokens", 20)
    assert run(*prompt) == 0
    whole = capsys.readouterr().out
    assert run(*prompt, "--exit", "confidence", "--threshold", 1) == 0
    assert capsys.readouterr().out == whole
    assert run(*prompt, "--exit", "confidence", "--threshold", 0.02, "--stats", "--json") == 0
    exits = json.loads(capsys.readouterr().out)["exits"]
    assert sum(exits["histogram"]) == exits["num_tokens"] == 19
    assert 0 < exits["histogram"][0] < 19
    assert 3 < exits["mean_layers"] < exits["num_layers"] == 6
    assert exits["agreement"] < 1
    assert exits["simulated"] is False
    drawn = tmp_path / "exits.svg"
    assert run(*prompt, "--exit", "confidence", "--threshold", 0.02, "--plot", drawn) == 0
    capsys.readouterr()
    assert f"{exits['mean_layers']:.1f} of 6 layers per token" in drawn.read_text(encoding="utf-8")
    assert run(*prompt, "--exit", "confidence", "--plot", tmp_path / "exits.xyz") == 1
    assert "is not a supported image file name" in capsys.readouterr().err
    assert run(*prompt, "--plot", drawn) == 2
    assert run(*prompt, "--threshold", 0.5) == 1
    assert "--threshold requires --exit" in capsys.readouterr().err
    assert run(*prompt, "--exit", "oracle", "--stats") == 0
    captured = capsys.readouterr()
    assert captured.out == whole
    assert "agreement  100.0% of tokens" in captured.err
    assert "simulated  policy 'oracle' runs all layers" in captured.err


def test_generate_speculates(models, capsys):
    """The whole model's text; drafts are counted; it excludes early exits, which are lossy."""
    prompt = ("generate", models / "recursive", "abc", "--max-new-tokens", 20)
    assert run(*prompt) == 0
    whole = capsys.readouterr().out
    assert run(*prompt, "--speculate", "--stats") == 0
    captured = capsys.readouterr()
    assert captured.out == whole
    assert "accepted" in captured.err
    assert "at full depth" in captured.err
    assert run(*prompt, "--speculate", "--exit", "confidence") == 1
    assert "Use --exit or --speculate" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("recursive", ("--exit", "sure"), "Unknown exit policy 'sure'"),
        ("recursive", ("--exit", "confidence", "--threshold", 2), "threshold 2 is outside -1 .. 1"),
        ("recursive", ("--exit", "head"), "needs exit heads, and the model has none"),
        ("recursive", ("--exit", "confidence", "--kv", "lost"), "Unknown kv 'lost'"),
        ("dense", ("--exit", "confidence"), "is a dense model, and this needs a recursive one"),
    ],
)
def test_generate_refuses_exits_that_do_not_fit(models, capsys, model, arguments, message):
    """One clear line each."""
    assert run("generate", models / model, "abc", *arguments) == 1
    assert message in capsys.readouterr().err


def test_damaged_recursive_model(models, tmp_path, capsys):
    """A recursive folder with a shard cut short."""
    import shutil

    shutil.copytree(models / "recursive", tmp_path / "damaged")
    file = tmp_path / "damaged" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    for command in (["inspect"], ["export", "-o", tmp_path / "out"], ["generate", "x"]):
        arguments = [command[0], tmp_path / "damaged", *command[1:]]
        assert run(*arguments) == 1, command
        assert "Error: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_export_formats(models, tmp_path, capsys):
    """dense, peft where the layout allows it, and nothing else."""
    assert run("export", models / "recursive", "-o", tmp_path / "dense") == 0
    assert "LlamaForCausalLM" in capsys.readouterr().out
    assert run("export", models / "recursive", "-o", tmp_path / "peft", "--format", "peft") == 1
    assert "Only cycle sharing without prelude and coda" in capsys.readouterr().err
    assert run("export", models / "recursive", "-o", tmp_path / "onnx", "--format", "onnx") == 1
    assert "Unknown format 'onnx'. Use one of: dense, peft" in capsys.readouterr().err
    assert run("convert", models / "dense", "-o", tmp_path / "cycle", "--sharing", "cycle", *TINY) == 0
    assert run("export", tmp_path / "cycle", "-o", tmp_path / "peft", "--format", "peft") == 0
    assert (tmp_path / "peft" / "adapter" / "adapter_config.json").exists()


def test_convert_in_half_precision(models, tmp_path):
    """``--dtype`` is what lies on disk."""
    assert run("convert", models / "dense", "-o", tmp_path / "out", *TINY, "--dtype", "bfloat16") == 0
    model = RecursiveForCausalLM.from_pretrained(tmp_path / "out")
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())


def test_a_model_with_exits(models, tmp_path, capsys):
    """``inspect`` tells of them; a dense export leaves them out, a peft export is refused."""
    assert run("convert", models / "dense", "-o", tmp_path / "cycle", "--sharing", "cycle", *TINY) == 0
    model = RecursiveForCausalLM.from_pretrained(tmp_path / "cycle")
    model.add_exit_heads("low_rank", rank=2, through_coda=False)
    model.save_pretrained(tmp_path / "cycle")
    assert run("inspect", tmp_path / "cycle") == 0
    assert "exits     after depth 0: low_rank head\n" in capsys.readouterr().out
    assert run("inspect", models / "recursive", "--json") == 0
    assert json.loads(capsys.readouterr().out)["exits"] is None
    assert run("export", tmp_path / "cycle", "-o", tmp_path / "dense") == 0
    assert "not exported: exit heads" in capsys.readouterr().out
    assert run("export", tmp_path / "cycle", "-o", tmp_path / "peft", "--format", "peft") == 1
    assert "this model has exit heads" in capsys.readouterr().err
