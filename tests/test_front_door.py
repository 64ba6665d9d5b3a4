"""The public names of the package: README's program, their imports, types and documentation, and wrong arguments."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import recursify
from helpers.loopback_hub import LoopbackHub
from helpers.pages import ROOT, blocks
from helpers.tiny_models import byte_tokenizer, convert_tiny, save_tiny
from recursify.errors import RecursifyError

PROGRAM = blocks(ROOT / "README.md", "python")[0].text
DENSE = "HuggingFaceTB/SmolLM2-135M-Instruct"
FUNCTIONS = [name for name in recursify.__all__ if inspect.isfunction(getattr(recursify, name))]


def run_python(script: str, *arguments: object, **options: typing.Any) -> subprocess.CompletedProcess[str]:
    """Run a script in a fresh process."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **options)


@pytest.fixture(scope="module")
def recursive(tmp_path_factory) -> Path:
    """Folder of a tiny recursive model."""
    home = tmp_path_factory.mktemp("front-door")
    save_tiny(home / "dense")
    convert_tiny(home / "dense", home / "recursive", lora_rank=4)
    return home / "recursive"


def test_program_of_readme(tmp_path):
    """It runs word for word: convert, uptrain, evaluate, generate, serve requests, push."""
    save_tiny(tmp_path / DENSE, num_hidden_layers=10, max_position_embeddings=2048)
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = "<s>"  # TRL needs one
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.save_pretrained(tmp_path / DENSE)
    (tmp_path / "notes.md").write_text("The cat sat on the mat. A dog ran after the cat.\n\n" * 100)
    assert 14 <= len([line for line in PROGRAM.splitlines() if line.strip()]) <= 16
    with LoopbackHub(user="me") as hub:
        environment = {**hub.environment(tmp_path), "PYTHONPATH": str(ROOT / "src")}
        done = run_python(PROGRAM, cwd=tmp_path, env=environment, timeout=500)
        assert done.returncode == 0, done.stderr
        assert float(done.stdout.splitlines()[0]) > 1
        assert "Once upon a time" in done.stdout
        files = hub.files("me/smollm2-recursive")
    assert {"config.json", "model.safetensors", "README.md"} <= set(files)


def test_import_is_light():
    """``import recursify`` loads neither torch nor transformers, and works without an installed distribution."""
    heavy = ("torch", "transformers", "pydantic", "numpy", "yaml", "typer", "rich", "huggingface_hub")
    script = f"import sys, recursify; assert not {set(heavy)} & set(sys.modules); print(recursify.__version__)"
    done = run_python(script)
    assert done.returncode == 0, done.stderr
    alone = run_python(
        "import sys; sys.path = [p for p in sys.path if 'site-packages' not in p]; import recursify; "
        "print(recursify.__version__)",
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )
    assert alone.returncode == 0, alone.stderr
    assert alone.stdout.strip() == "0+unknown"


def test_help_is_light():
    """``recursify --help`` loads no settings class and no command."""
    script = (
        "import sys\nfrom recursify.cli.app import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "loaded = {'torch', 'transformers', 'pydantic', 'yaml', 'recursify.cli.convert'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    done = run_python(script)
    assert done.returncode == 0, done.stderr


def test_names():
    """Every name in ``__all__`` resolves, ``dir`` lists it, and the lazy table has no other."""
    assert sorted(recursify.__all__) == list(recursify.__all__) == dir(recursify)
    lazy = [name for names in recursify.MODULES.values() for name in names]
    assert set(lazy) <= set(recursify.__all__)
    for name in recursify.__all__:
        assert getattr(recursify, name) is not None
    with pytest.raises(AttributeError, match="module 'recursify' has no attribute 'convert_modl'"):
        recursify.convert_modl  # noqa: B018
    errors = {name for name, value in vars(recursify.errors).items() if inspect.isclass(value)}
    assert errors <= set(recursify.__all__)


def test_type_checkers_see_the_names():
    """The imports for type checkers give the same names from the same modules as the lazy table."""
    tree = compile(Path(recursify.__file__).read_text(), "__init__", "exec", flags=0x400)  # PyCF_ONLY_AST
    block = next(node for node in tree.body if type(node).__name__ == "If")
    typed = {node.module: [alias.name for alias in node.names] for node in block.body}
    assert typed == recursify.MODULES


@pytest.mark.parametrize("name", [name for name in recursify.__all__ if name != "__version__"])
def test_documented(name):
    """A docstring of its own, that opens with a capital letter and ends its first sentence."""
    entry = getattr(recursify, name)
    assert entry.__doc__ != (entry.__bases__[0].__doc__ if inspect.isclass(entry) else None)
    first = entry.__doc__.strip().split("\n\n")[0]
    assert first[0].isupper() or first.startswith("`"), first
    assert first.rstrip()[-1] in ".:", first


def test_reference_page():
    """It lists every public name but the errors, which have a page of their own."""
    page = (ROOT / "docs" / "reference" / "recursify.md").read_text(encoding="utf-8")
    listed = [line.removeprefix("::: recursify.") for line in page.splitlines() if line.startswith(":::")]
    assert sorted(listed) == [n for n in recursify.__all__ if n != "__version__" and not hasattr(recursify.errors, n)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_typed(name):
    """Every parameter and the result are annotated; all but the subjects are keywords and documented."""
    function = getattr(recursify, name)
    signature = inspect.signature(function)
    documented = function.__doc__ or ""
    for parameter in signature.parameters.values():
        assert parameter.annotation is not parameter.empty, parameter.name
        if len(signature.parameters) > 1:
            assert f"{parameter.name}:" in documented, f"{name}({parameter.name})"
    assert signature.return_annotation is not signature.empty
    positional = [p.name for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert set(positional) <= {"model", "output", "source", "prompt", "tasks", "repo_id", "plan"}


@pytest.mark.parametrize("name", [name for name in recursify.__all__ if inspect.isclass(getattr(recursify, name))])
def test_methods_are_typed(name):
    """Public methods of the public classes, except those of transformers, are annotated and documented."""
    kind = getattr(recursify, name)
    for key, method in vars(kind).items():
        if key.startswith("_") or not inspect.isfunction(method) or not method.__module__.startswith("recursify"):
            continue
        assert method.__doc__, f"{name}.{key}"
        signature = inspect.signature(method)
        assert signature.return_annotation is not signature.empty, f"{name}.{key}"


REGISTERED = """
import sys
{imports}
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert type(model).__module__.startswith("recursify."), type(model).__module__
"""


@pytest.mark.parametrize(
    "imports",
    [
        "import recursify",
        "import transformers\nimport recursify",
        "from transformers import AutoConfig, AutoTokenizer\nimport recursify",
        "import recursify\nfrom transformers import PreTrainedModel\nimport transformers.pipelines",
        "import recursify.modeling",
    ],
    ids=lambda text: text.replace("\n", "; "),
)
def test_registration(recursive, imports):
    """``AutoModelForCausalLM`` loads a recursive folder with recursify's own classes, whatever is imported first."""
    done = run_python(REGISTERED.format(imports=imports), recursive)
    assert done.returncode == 0, done.stderr


def test_registration_leaves_no_hook(recursive):
    """The import hook is gone once the classes are registered, and other modules load as before."""
    script = (
        "import sys, recursify\n"
        "assert [h for h in sys.meta_path if type(h).__name__ == 'AutoClassesHook']\n"
        "from transformers import AutoConfig\n"
        "assert not [h for h in sys.meta_path if type(h).__name__ == 'AutoClassesHook']\n"
        "print(AutoConfig.from_pretrained(sys.argv[1]).model_type)\n"
    )
    done = run_python(script, recursive)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "recursive"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model, out: recursify.convert_model(model, out, num_recursion=2), "Did you mean 'num_recursions'?"),
        (lambda model, out: recursify.convert_model(model, out, num_recursions=0), "num_recursions must be a whole"),
        (lambda model, out: recursify.convert_model(model, out, lora_rank="big"), "or 'full', got 'big'"),
        (lambda model, out: recursify.convert_model(model, out, settings={"seed": 1}), "must be ConversionSettings"),
        (
            lambda model, out: recursify.convert_model(model, out, settings=recursify.ConversionSettings(), seed=1),
            "Got settings and also seed",
        ),
        (lambda model, out: recursify.uptrain_model(model, out, max_token=1), "Did you mean 'max_tokens'?"),
        (lambda model, out: recursify.uptrain_model(model, out, learning_rate="fast"), "must be a number above 0"),
        (lambda model, out: recursify.uptrain_model(model, out, sharding="all"), "Use one of: none, fsdp2, zero2"),
        (lambda model, out: recursify.evaluate_model("nowhere"), "nowhere"),
        (lambda model, out: recursify.inspect_model("nowhere"), "There is no model folder at 'nowhere'"),
        (lambda model, out: recursify.export_model(model, out, format="onnx"), "Use one of: dense, peft"),
        (lambda model, out: recursify.load_model(model, dtype="int4"), "Unknown dtype 'int4'"),
        (lambda model, out: recursify.generate_text(model, "a", exit_policy="sure"), "Unknown exit policy 'sure'"),
        (
            lambda model, out: recursify.generate_text(model, "a", speculate=True, exit_policy="head"),
            "Use --exit or --speculate",
        ),
        (lambda model, out: recursify.evaluate_model(model, max_token=3), "Did you mean 'max_tokens'?"),
        (lambda model, out: recursify.evaluate_tasks(model, "arc", depths="deep"), "each a depth (0, 1, ...) or 'all'"),
        (
            lambda model, out: recursify.evaluate_tasks(model, "arc", limit=0),
            "limit must be a whole number of at least 1",
        ),
        (
            lambda model, out: recursify.calibrate_exits(model, target_agreement=1),
            "must be a number above 0 and below 1",
        ),
        (lambda model, out: recursify.push_model("nowhere", "me/x"), "There is no model folder at 'nowhere'"),
        (lambda model, out: recursify.push_model(model, "a/b/c", dry_run=True), "is not a valid repository name"),
        (lambda model, out: recursify.push_model(model, "me/x", card="a.md", license="mit"), "Omit --base-model and"),
        (lambda model, out: recursify.Engine(model), "Use Engine.from_pretrained"),
        (lambda model, out: recursify.Engine.from_pretrained(model, max_num_seq=2), "Did you mean 'max_num_seqs'?"),
        (lambda model, out: recursify.Engine.from_pretrained(model, max_num_seqs=0), "max_num_seqs must be a whole"),
        (lambda model, out: recursify.serve_model(model, max_num_seq=2), "Did you mean 'max_num_seqs'?"),
        (lambda model, out: recursify.serve_model(model, max_queue=-1), "max_queue must be a whole number of at least"),
        (lambda model, out: recursify.benchmark_model(model, round=2), "Did you mean 'rounds'?"),
    ],
)
def test_wrong_arguments(recursive, tmp_path, call, message):
    """One clear error of ours each, one line, and nothing is written."""
    with pytest.raises(RecursifyError) as raised:
        call(str(recursive), str(tmp_path / "out"))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_unexpected_keyword():
    """A function without settings refuses an unknown keyword by itself."""
    with pytest.raises(TypeError, match="unexpected keyword argument 'max_token'"):
        recursify.inspect_model("model", max_token=3)
