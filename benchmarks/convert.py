"""Time, memory and bytes of a conversion, beside a plain copy of the folder and beside mergekit.

The dense model is synthetic: a Llama-shaped bfloat16 checkpoint (1.1 billion parameters at 22 layers) in shards of
500 MB. Each measurement is a fresh process; the cases take turns, repeat by repeat, and the median of each is kept.

    python benchmarks/convert.py
    python benchmarks/convert.py --mergekit-python /path/to/another-venv/bin/python

What is measured of a process, and why there are two columns for each:

* wall seconds until it ends, and "durable" seconds: wall plus the ``fsync`` of what it wrote. recursify syncs its own
  output; the copy and mergekit leave theirs in the page cache. Both are given so that neither reading is hidden.
* its own CPU seconds, and how many CPUs other processes kept busy meanwhile: wall seconds of a machine that others use
  are worth little, and this tells how little.
* peak resident memory (``VmHWM``) and peak anonymous memory (``RssAnon``). Pages of a memory-mapped checkpoint are
  resident, but the system takes them back whenever it likes, so only the anonymous part is what a machine has to have.

Only the standard library is imported here: a parent's size would show in its children's ``ru_maxrss``.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path

HIDDEN, INTERMEDIATE, VOCABULARY, HEADS, KV_HEADS = 2048, 5632, 32000, 32, 4
RECURSIONS = 2
LORA_RANK = 64
SHARD_BYTES = 500 * 10**6
SAMPLING_SECONDS = 0.02
MB = 10**6

MAKE_CHECKPOINT = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
folder, specification = Path(sys.argv[1]), json.loads(sys.argv[2])
generator = torch.Generator().manual_seed(0)
total, weight_map = 0, {}
for file, shapes in specification.items():
    shard = {}
    for name, shape in shapes.items():
        if len(shape) == 1:
            shard[name] = torch.ones(shape, dtype=torch.bfloat16)
        else:
            shard[name] = torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)
        total += shard[name].nbytes
        weight_map[name] = file
    save_file(shard, folder / file, metadata={"format": "pt"})
index = {"metadata": {"total_size": total}, "weight_map": weight_map}
(folder / "model.safetensors.index.json").write_text(json.dumps(index))
"""
"""Run in a process of its own; holds one shard at a time."""

RECURSIFY_COMMAND = "from recursify.cli.app import main; main()"
RECURSIFY_IMPORT = "import recursify.convert.pipeline"
MERGEKIT_IMPORT = "import mergekit.scripts.run_yaml"
COPY_COMMAND = "import shutil, sys; shutil.copytree(sys.argv[1], sys.argv[2])"

MERGEKIT_CONFIG = """
merge_method: linear
dtype: bfloat16
slices:
  - sources:
      - model: {first}
        layer_range: [0, {half}]
        parameters: {{weight: 0.5}}
      - model: {second}
        layer_range: [{half}, {layers}]
        parameters: {{weight: 0.5}}
"""
"""The mean of the two halves, in float32, stored in bfloat16: what rank 0 with ``--init average`` stores, too.

mergekit keys inputs by model, so the second half is named through a symbolic link to the same folder.
"""


@dataclass(frozen=True)
class Case:
    """Something to measure.

    Attributes:
        name: Name in the table.
        tool: copy, recursify or mergekit.
        command: Arguments of the process; ``{output}`` stands for the folder to write.
        is_slow: Repeated ``--slow-repeats`` times only.
    """

    name: str
    tool: str
    command: list[str]
    is_slow: bool = False

    @property
    def is_import(self) -> bool:
        return self.name.endswith("import")


@dataclass(frozen=True)
class Run:
    """One process, measured; memory in bytes."""

    wall_seconds: float
    durable_seconds: float
    cpu_seconds: float
    others_cpus: float
    peak_rss: int
    peak_anonymous: int
    output_bytes: int


@dataclass
class Row:
    """Medians of one case; what the CSV holds beside the versions."""

    case: str
    tool: str
    repeats: int
    wall_seconds: float
    wall_min: float
    wall_max: float
    durable_seconds: float
    wall_ratio_to_copy: float | None
    durable_ratio_to_copy: float | None
    cpu_seconds: float
    others_cpus: float
    peak_rss_mb: float
    peak_anonymous_mb: float
    rss_above_import_mb: float | None
    anonymous_above_import_mb: float | None
    output_mb: float
    aims: str = field(default="")


def tensor_shapes(num_layers: int) -> dict[str, list[int]]:
    """Name -> shape of every tensor of the dense model, in the order of depth."""
    kv = HIDDEN // HEADS * KV_HEADS
    shapes = {"model.embed_tokens.weight": [VOCABULARY, HIDDEN]}
    layer = {
        "self_attn.q_proj": [HIDDEN, HIDDEN],
        "self_attn.k_proj": [kv, HIDDEN],
        "self_attn.v_proj": [kv, HIDDEN],
        "self_attn.o_proj": [HIDDEN, HIDDEN],
        "mlp.gate_proj": [INTERMEDIATE, HIDDEN],
        "mlp.up_proj": [INTERMEDIATE, HIDDEN],
        "mlp.down_proj": [HIDDEN, INTERMEDIATE],
        "input_layernorm": [HIDDEN],
        "post_attention_layernorm": [HIDDEN],
    }
    for index in range(num_layers):
        shapes.update({f"model.layers.{index}.{name}.weight": shape for name, shape in layer.items()})
    shapes["model.norm.weight"] = [HIDDEN]
    shapes["lm_head.weight"] = [VOCABULARY, HIDDEN]
    return shapes


def num_bytes(shape: list[int]) -> int:
    """Bytes of a bfloat16 tensor."""
    size = 2
    for length in shape:
        size *= length
    return size


def memory_aim() -> int:
    """Bytes of embedding and head and of ``RECURSIONS + 2`` dense layers: what a conversion may hold."""
    shapes = tensor_shapes(1)
    layer = sum(num_bytes(shape) for name, shape in shapes.items() if ".layers." in name)
    embeddings = sum(num_bytes(shapes[name]) for name in ("model.embed_tokens.weight", "lm_head.weight"))
    return embeddings + (RECURSIONS + 2) * layer


def make_checkpoint(folder: Path, num_layers: int) -> int:
    """Write the dense model into ``folder``; returns its number of parameters."""
    folder.mkdir()
    shapes = tensor_shapes(num_layers)
    shards: list[dict[str, list[int]]] = [{}]
    for name, shape in shapes.items():
        if shards[-1] and sum(map(num_bytes, shards[-1].values())) + num_bytes(shape) > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = shape
    named = {f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards)}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "vocab_size": VOCABULARY,
        "num_hidden_layers": num_layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    subprocess.run([sys.executable, "-c", MAKE_CHECKPOINT, str(folder), json.dumps(named)], check=True)
    return sum(num_bytes(shape) // 2 for shape in shapes.values())


def recursify_cases(dense: Path) -> list[Case]:
    """The copy, recursify's bare import, and the two conversions."""
    convert = [sys.executable, "-c", RECURSIFY_COMMAND, "convert", str(dense), "-o", "{output}", "--no-check"]
    convert += ["--recursions", str(RECURSIONS), "--sharing", "cycle", "--init", "average"]
    convert += ["--calibration-data", "none"]
    relaxed = ["--lora-rank", str(LORA_RANK), "--relaxation", "svd"]
    return [
        Case("copy", "copy", [sys.executable, "-c", COPY_COMMAND, str(dense), "{output}"]),
        Case("recursify import", "recursify", [sys.executable, "-c", RECURSIFY_IMPORT]),
        Case("recursify rank 0", "recursify", [*convert, "--lora-rank", "0"]),
        Case(f"recursify rank {LORA_RANK}, svd", "recursify", [*convert, *relaxed], is_slow=True),
    ]


def mergekit_cases(dense: Path, python: str, num_layers: int) -> list[Case]:
    """mergekit's bare import, its linear merge as it comes, and with shards small enough to stream."""
    twin = dense.with_name("twin")
    twin.symlink_to(dense, target_is_directory=True)
    config = dense.with_name("merge.yaml")
    config.write_text(MERGEKIT_CONFIG.format(first=dense, second=twin, half=num_layers // 2, layers=num_layers))
    merge = [python, "-m", "mergekit.scripts.run_yaml", str(config), "{output}", "--quiet", "--no-copy-tokenizer"]
    lazy = ["--lazy-unpickle", "--out-shard-size", "250M"]  # counted in elements or bytes, by mergekit's version
    return [
        Case("mergekit import", "mergekit", [python, "-c", MERGEKIT_IMPORT]),
        Case("mergekit linear, defaults", "mergekit", merge),
        Case("mergekit linear, lazy, 250M shards", "mergekit", [*merge, *lazy]),
    ]


def watch(process: subprocess.Popen[bytes]) -> tuple[int, int]:
    """Peak resident and peak anonymous bytes of ``process``, sampled until it ends."""
    peaks = {"VmHWM": 0, "RssAnon": 0}
    status = Path(f"/proc/{process.pid}/status")
    while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        try:
            lines = status.read_text().splitlines()
        except OSError:
            break
        for line in lines:
            key, _, value = line.partition(":")
            if key in peaks:
                peaks[key] = max(peaks[key], int(value.split()[0]) * 1024)
        time.sleep(SAMPLING_SECONDS)
    return peaks["VmHWM"], peaks["RssAnon"]


def busy_seconds() -> float:
    """CPU seconds that all processes of the machine have used so far."""
    user, nice, system, _idle, _iowait, irq, softirq = map(int, Path("/proc/stat").read_text().split()[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def measure(case: Case, output: Path) -> Run:
    """Run ``case`` once, in a process of its own, and remove what it wrote."""
    command = [str(output) if argument == "{output}" else argument for argument in case.command]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    os.sync()  # nothing of an earlier run is still being written
    with tempfile.TemporaryFile() as log:
        start, busy = time.perf_counter(), busy_seconds()
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        peak_rss, peak_anonymous = watch(process)
        _, status, usage = os.wait4(process.pid, 0)
        wall, busy = time.perf_counter() - start, busy_seconds() - busy
        process.returncode = os.waitstatus_to_exitcode(status)  # it was reaped here, for its own usage
        if process.returncode:
            log.seek(0)
            raise RuntimeError(f"{case.name} failed:\n{log.read().decode(errors='replace')[-4000:]}")
    files = [file for file in output.rglob("*") if file.is_file()] if output.exists() else []
    for file in files:
        with open(file, "rb") as stream:
            os.fsync(stream.fileno())
    durable = time.perf_counter() - start
    written = sum(file.stat().st_size for file in files)
    shutil.rmtree(output, ignore_errors=True)
    mine = usage.ru_utime + usage.ru_stime
    return Run(wall, durable, mine, max(0.0, busy - mine) / wall, peak_rss, peak_anonymous, written)


def measure_all(cases: list[Case], output: Path, *, repeats: int, slow_repeats: int) -> dict[str, list[Run]]:
    """Runs by case; the cases take turns, so that a slow spell of the machine hits all of them."""
    runs: dict[str, list[Run]] = {case.name: [] for case in cases}
    for repeat in range(max(repeats, slow_repeats)):
        for case in cases:
            if repeat >= (slow_repeats if case.is_slow else repeats):
                continue
            run = measure(case, output)
            runs[case.name].append(run)
            print(f"{repeat + 1}: {case.name}: {run.wall_seconds:.2f} s, {run.peak_anonymous / MB:.0f} MB", flush=True)
    return runs


def median(runs: list[Run], attribute: str) -> float:
    """Median over ``runs`` of one of their figures."""
    return float(statistics.median(getattr(run, attribute) for run in runs))


def summarize(cases: list[Case], runs: dict[str, list[Run]]) -> list[Row]:
    """Medians by case, set against the copy and against the tool's bare import."""
    imports = {case.tool: runs[case.name] for case in cases if case.is_import}
    rows = []
    for case in cases:
        mine = runs[case.name]
        row = Row(
            case=case.name,
            tool=case.tool,
            repeats=len(mine),
            wall_seconds=median(mine, "wall_seconds"),
            wall_min=min(run.wall_seconds for run in mine),
            wall_max=max(run.wall_seconds for run in mine),
            durable_seconds=median(mine, "durable_seconds"),
            wall_ratio_to_copy=None,
            durable_ratio_to_copy=None,
            cpu_seconds=median(mine, "cpu_seconds"),
            others_cpus=median(mine, "others_cpus"),
            peak_rss_mb=median(mine, "peak_rss") / MB,
            peak_anonymous_mb=median(mine, "peak_anonymous") / MB,
            rss_above_import_mb=None,
            anonymous_above_import_mb=None,
            output_mb=median(mine, "output_bytes") / MB,
        )
        if not case.is_import:
            row.wall_ratio_to_copy = row.wall_seconds / median(runs["copy"], "wall_seconds")
            row.durable_ratio_to_copy = row.durable_seconds / median(runs["copy"], "durable_seconds")
            if bare := imports.get(case.tool):
                row.rss_above_import_mb = row.peak_rss_mb - median(bare, "peak_rss") / MB
                row.anonymous_above_import_mb = row.peak_anonymous_mb - median(bare, "peak_anonymous") / MB
        rows.append(row)
    return rows


def judge(rows: list[Row]) -> None:
    """Write into each row of a conversion which aims it meets: figure, limit, verdict."""
    merges = [row for row in rows if row.case.startswith("mergekit linear")]
    for row in rows:
        if row.tool != "recursify" or row.anonymous_above_import_mb is None:
            continue
        aims = [
            ("anonymous MB above import <= embeddings + 4 layers", row.anonymous_above_import_mb, memory_aim() / MB)
        ]
        if row.case == "recursify rank 0":
            aims += [
                (f"{kind} ÷ copy <= 2", getattr(row, f"{kind}_ratio_to_copy"), 2.0) for kind in ("wall", "durable")
            ]
            compared = (
                "wall_seconds",
                "durable_seconds",
                "cpu_seconds",
                "peak_anonymous_mb",
                "peak_rss_mb",
                "output_mb",
            )
            for figure in compared if merges else ():
                best = min(getattr(merge, figure) for merge in merges)
                aims.append((f"{figure} <= mergekit's best", getattr(row, figure), best))
        verdicts = (
            f"{aim}: {got:,.2f} of {limit:,.2f} {'met' if got <= limit else 'MISSED'}" for aim, got, limit in aims
        )
        row.aims = "; ".join(verdicts)


def versions(python: str, packages: list[str]) -> dict[str, str]:
    """Versions of ``packages`` as ``python`` has them; empty where it has none."""
    code = (
        "import json, sys\nfrom importlib.metadata import PackageNotFoundError, version\nfound = {}\n"
        "for name in sys.argv[1:]:\n    try:\n        found[name] = version(name)\n"
        "    except PackageNotFoundError:\n        found[name] = ''\nprint(json.dumps(found))"
    )
    done = subprocess.run([python, "-c", code, *packages], check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout))


def commit() -> str:
    """The short commit that was measured, with a mark if tracked files differ from it; empty outside a checkout."""
    here = Path(__file__).resolve().parent
    command = ["git", "-C", str(here), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    changed = subprocess.run(["git", "-C", str(here), "diff", "--quiet", "HEAD", "--", "../src"], check=False)
    return done.stdout.strip() + ("+changes" if done.returncode == 0 and changed.returncode == 1 else "")


def about(arguments: argparse.Namespace, num_parameters: int) -> dict[str, str | int]:
    """Versions and machine behind the figures; the same on every row of the CSV."""
    ours = versions(sys.executable, ["recursify", "torch", "transformers", "safetensors"])
    theirs = dict.fromkeys(("mergekit", "torch", "transformers"), "")
    if arguments.mergekit_python:
        theirs = versions(arguments.mergekit_python, list(theirs))
    return {
        "layers": arguments.layers,
        "parameters": num_parameters,
        "memory_aim_mb": round(memory_aim() / MB, 1),
        **ours,
        "mergekit": theirs["mergekit"],
        "mergekit_torch": theirs["torch"],
        "mergekit_transformers": theirs["transformers"],
        "python": ".".join(map(str, sys.version_info[:3])),
        "cpus": len(os.sched_getaffinity(0)),
        "date": date.today().isoformat(),
        "commit": commit(),
    }


def write_csv(rows: list[Row], context: dict[str, str | int], file: Path) -> None:
    """One line per case."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, [*asdict(rows[0]), *context], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            figures = {
                key: round(value, 3) if isinstance(value, float) else value for key, value in asdict(row).items()
            }
            writer.writerow({**figures, **context})


def table(rows: list[Row], context: dict[str, str | int]) -> str:
    """The figures as markdown, aims under them."""

    def shown(value: float | None, digits: int) -> str:
        return "" if value is None else f"{value:,.{digits}f}"

    lines = [
        "| Case | Runs | Wall s (min-max) | ÷ copy | Durable s | ÷ copy | CPU s | Others' CPUs | Peak RSS MB "
        "| Peak anon MB | RSS above import MB | Anon above import MB | Output MB |",
        "| --- " + "| ---: " * 12 + "|",
    ]
    for row in rows:
        cells = [
            row.case,
            str(row.repeats),
            f"{row.wall_seconds:.2f} ({row.wall_min:.2f}-{row.wall_max:.2f})",
            shown(row.wall_ratio_to_copy, 2),
            shown(row.durable_seconds, 2),
            shown(row.durable_ratio_to_copy, 2),
            shown(row.cpu_seconds, 1),
            shown(row.others_cpus, 1),
            shown(row.peak_rss_mb, 0),
            shown(row.peak_anonymous_mb, 0),
            shown(row.rss_above_import_mb, 0),
            shown(row.anonymous_above_import_mb, 0),
            shown(row.output_mb, 0),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *(f"- {row.case}: {aim}" for row in rows if row.aims for aim in row.aims.split("; "))]
    lines += ["", ", ".join(f"{key} {value}" for key, value in context.items() if value != "")]
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=22, help="even; 22 makes 1.1 billion parameters [%(default)s]")
    parser.add_argument("--repeats", type=int, default=3, help="processes per case [%(default)s]")
    parser.add_argument(
        "--slow-repeats", type=int, default=1, help="processes for the SVD case, 0 to leave it out [%(default)s]"
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/convert.csv"), help="[%(default)s]")
    parser.add_argument("--mergekit-python", help="python of a virtual environment that has mergekit")
    parser.add_argument("--scratch", type=Path, help="where the temporary folder goes; needs 3x the model's size")
    arguments = parser.parse_args()
    if arguments.layers < RECURSIONS or arguments.layers % RECURSIONS:
        parser.error(f"--layers must be a multiple of {RECURSIONS}")
    return arguments


def main() -> None:
    """Make the model, measure, report."""
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="recursify-benchmark-", dir=arguments.scratch) as scratch:
        dense = Path(scratch) / "dense"
        num_parameters = make_checkpoint(dense, arguments.layers)
        context = about(arguments, num_parameters)  # before, so that a commit made meanwhile is not taken for it
        cases = recursify_cases(dense)
        if arguments.mergekit_python:
            cases += mergekit_cases(dense, arguments.mergekit_python, arguments.layers)
        else:
            print("mergekit is left out: name the python that has it with --mergekit-python.")
        if not arguments.slow_repeats:
            cases = [case for case in cases if not case.is_slow]
        runs = measure_all(
            cases, Path(scratch) / "output", repeats=arguments.repeats, slow_repeats=arguments.slow_repeats
        )
    rows = summarize(cases, runs)
    judge(rows)
    if context["commit"] != commit():
        print("The sources changed while they were measured: run it again.", file=sys.stderr)
    write_csv(rows, context, arguments.output)
    print("\n" + table(rows, context))


if __name__ == "__main__":
    main()
