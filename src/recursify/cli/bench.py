"""``recursify bench``."""

from __future__ import annotations

import recursify
from recursify import BenchSettings

from .from_settings import options_from_settings
from .options import JsonOption, LoadingOptions, ModelArgument
from .report import format_table, print_data, print_json, progress_report, talk

HELP = """
Measure the speed of the engine: at full depth, with forced exits, with forced exits in lockstep, and with a policy's
exits, beside transformers' `generate` and `generate_batch` and a dense model. All of them get the same requests and
take turns in one process, so that their ratios are reliable.

**Examples**

`recursify bench smollm2-exits --dense smollm2-135m --concurrency 1 --concurrency 8`

`recursify bench smollm2-r2 --forced 0.5 --forced 0.5 --even --json`

`recursify bench smollm2-exits --exit confidence --threshold 0.6 --plot bench.png`
"""


@options_from_settings
def command(model: ModelArgument, loading: LoadingOptions, settings: BenchSettings, json: JsonOption = False) -> None:
    with progress_report() as progress:
        result = recursify.benchmark_model(model, settings=settings, **vars(loading), progress=progress)
    if settings.plot is not None:
        talk.print(f"wrote {settings.plot}")
    print_json(result.to_dict()) if json else print_data(_table(result))


def _table(result: recursify.BenchmarkResult) -> str:
    notes = (
        f"{result.clock}; {result.device}, {result.dtype}, {result.threads} threads; median of {result.rounds} rounds. "
        f"× generate is relative to generate with the same batch size. G is the gain over the engine at full depth, "
        f"without prompts; G* is the theoretical gain if costs follow the number of rows, G* per call if they follow "
        f"the number of calls; η = G / G*."
    )
    return format_table(*result.table()) + "\n\n" + notes
