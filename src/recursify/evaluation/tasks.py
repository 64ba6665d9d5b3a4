"""``evaluate_tasks``: tasks of lm-evaluation-harness on a recursive model at several depths and on its dense model."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from recursify.checkpoint.loading import load_model, require_exit, require_recursive
from recursify.checkpoint.record import read_record, update_record
from recursify.checkpoint.vocabulary import require_known_tokens
from recursify.errors import RecursifyError, SettingsError, TextError
from recursify.progress import Progress, silent
from recursify.settings import resolve_settings

from .settings import TaskSettings
from .text import text_start

logger = logging.getLogger(__name__)

NOT_METRICS = ("alias", "name", "sample_len", "sample_count")


@dataclass(frozen=True)
class Score:
    """One metric of one task.

    Attributes:
        task: Name of the task in lm-eval.
        metric: Name of the metric (``acc``, ``acc_norm``, ``exact_match``), followed by a comma and lm-eval's filter
            unless that is ``none``.
        value: Value that lm-eval computed.
        stderr: One standard error, where lm-eval has one.
        num_samples: Number of scored samples.
        num_fewshot: Number of solved examples in the prompt.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    num_samples: int
    num_fewshot: int

    def as_evaluation(self, depth: int | None, control: Score | None) -> dict[str, Any]:
        """Entry of ``evaluation`` in ``recursify.json``, with the dense model's score."""
        fields = asdict(self)
        return {
            "kind": "task",
            "name": fields.pop("task"),
            **fields,
            "depth": depth,
            "dense_value": None if control is None else control.value,
            "dense_stderr": None if control is None else control.stderr,
            "lm_eval": version("lm_eval"),
        }


def format_score(value: float, stderr: float | None) -> str:
    """A score with its standard error, if it has one."""
    return f"{value:.4f}" if stderr is None else f"{value:.4f} ± {stderr:.4f}"


@dataclass(frozen=True)
class TaskResults:
    """Scores of a recursive model on all tasks, at all requested depths.

    Attributes:
        model: Folder of the model.
        depths: Recursion after which every token exited, per run; None ran them all.
        entries: One entry per depth, task and metric, as :meth:`Score.as_evaluation` gives it, with the sample limit.
        warnings: Reasons why the dense model was not scored.
    """

    model: str
    depths: list[int | None]
    entries: list[dict[str, Any]]
    warnings: list[str]

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {"model": self.model, "evaluation": self.entries}


def evaluate_tasks(
    model: str | Path,
    tasks: str | Sequence[str],
    *,
    settings: TaskSettings | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    progress: Progress = silent,
    **options: Any,
) -> TaskResults:
    """Score a recursive model on tasks of lm-evaluation-harness.

    Args:
        model: Folder of a recursive model.
        tasks: Names of lm-eval's tasks and groups, or of tasks in ``include_path``.
        settings: Settings; give these or ``options``.
        dtype: ``float32``, ``bfloat16``, ``float16``, or ``auto`` for the checkpoint's.
        device: Device to run on, for instance ``cpu`` or ``cuda:1``.
        progress: Callback for the number of scored models and depths.
        options: Fields of :class:`~recursify.evaluation.settings.TaskSettings`.

    Raises:
        CheckpointError: ``model`` is not the folder of a recursive model, or does not load.
        SettingsError: lm-eval is not installed or has no such task, or the model has no exit after a depth.
        TextError: The data of a task is missing.
    """
    folder = require_recursive(model)
    settings = resolve_settings(TaskSettings, settings, options)
    depths = settings.depths or (None,)
    runner = TaskRunner([tasks] if isinstance(tasks, str) else tasks, settings)
    loaded, tokenizer = load_model(folder, dtype=dtype, device=device)
    for depth in depths:
        if depth is not None:
            require_exit(loaded.config, str(folder), depth)
    warnings: list[str] = []
    dense = _load_control(read_record(folder), dtype, device, warnings) if settings.control else None
    num_runs = len(depths) + (dense is not None)
    dense_scores: dict[tuple[str, str], Score] = {}
    if dense is not None:
        dense_scores = runner.score(*dense)
        progress("score", 1, num_runs)
    entries: list[dict[str, Any]] = []
    for done, depth in enumerate(depths, start=num_runs - len(depths) + 1):
        scores = runner.score(loaded, tokenizer, depth).items()
        new = [{**score.as_evaluation(depth, dense_scores.get(key)), "limit": settings.limit} for key, score in scores]
        entries += new
        if settings.save:
            # After every depth: a later one may fail. The record is read anew, as another process may have written it.
            update_record(folder, evaluation=_merge(read_record(folder).get("evaluation", []), new))
        progress("score", done, num_runs)
    return TaskResults(str(folder), list(depths), entries, warnings)


def _load_control(record: dict[str, Any], dtype: str, device: str, warnings: list[str]) -> tuple[Any, Any] | None:
    """The dense model that the record names, with its tokenizer; None, and a warning, where it cannot be loaded."""
    source = record.get("plan", {}).get("source")
    try:
        if source is not None:
            return load_model(source, dtype=dtype, device=device)
        warnings.append("The dense model was not scored: recursify.json does not name it.")
    except RecursifyError as error:
        warnings.append(f"The dense model was not scored: {error}")
    logger.warning(warnings[-1])
    return None


def _merge(before: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Entries of ``before`` with those of the same task, metric and depth replaced by ``new`` ones."""

    def key(entry: dict[str, Any]) -> tuple[Any, ...]:
        return entry["kind"], entry["name"], entry.get("metric"), entry.get("depth")

    replaced = {key(entry) for entry in new}
    return [entry for entry in before if key(entry) not in replaced] + new


class TaskRunner:
    """Scores models on the same tasks; arguments as in :func:`evaluate_tasks`.

    Raises:
        SettingsError: lm-eval is not installed, or has no such task.
    """

    def __init__(self, tasks: Sequence[str], settings: TaskSettings):
        try:
            version("lm_eval")
        except PackageNotFoundError as error:
            raise SettingsError(
                "Tasks are scored by lm-evaluation-harness, which is not installed. Run: pip install 'recursify[eval]'"
            ) from error
        from lm_eval.tasks import TaskManager

        folder = settings.include_path
        if folder is not None and not folder.is_dir():
            raise SettingsError(f"--include-path '{folder}' is not a folder. Give a folder with task files (YAML).")
        # lm-eval's own tasks take seconds to index, and include_path may be all that is needed.
        include = None if folder is None else str(folder)
        self.manager = TaskManager(include_path=include, include_defaults=False)
        if not set(tasks) <= set(self.manager.all_tasks):
            self.manager = TaskManager(include_path=include)
        if unknown := [name for name in tasks if name not in self.manager.all_tasks]:
            raise SettingsError(
                f"lm-eval has no task '{unknown[0]}'. List its tasks with: lm-eval ls tasks. Add a folder of your own "
                f"tasks with --include-path."
            )
        self.tasks, self.settings = list(tasks), settings

    def score(self, model: PreTrainedModel, tokenizer: Any, depth: int | None = None) -> dict[tuple[str, str], Score]:
        """Compute all metrics of all tasks, by task and metric; with a ``depth``, every token of ``model`` exits there.

        Raises:
            TextError: The data of a task is missing, or has a token that is not in the model's vocabulary.
            ValueError: The model has no exit after ``depth``.
        """
        from lm_eval import simple_evaluate

        with _fixed_depth(model, depth), _quiet_lm_eval():
            runner = _lm_eval_model(model, tokenizer, self.settings.batch_size)
            try:
                results = simple_evaluate(
                    model=runner,
                    tasks=self.tasks,
                    task_manager=self.manager,
                    num_fewshot=self.settings.num_fewshot,
                    limit=self.settings.limit,
                    log_samples=False,
                )
            except (OSError, ValueError) as error:
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise TextError(
                    f"The tasks {', '.join(self.tasks)} could not be run: {reason} Offline, put the data of a "
                    f"task into the cache of datasets, or name local files in its YAML."
                ) from error
        return {(score.task, score.metric): score for score in _scores(results)}


def _lm_eval_model(model: PreTrainedModel, tokenizer: Any, batch_size: int) -> Any:
    """lm-eval's model, which begins texts as the tokenizer does, and whose tokens are checked."""
    from lm_eval.models.huggingface import HFLM

    class CheckedModel(HFLM):
        def tok_encode(self, *args: Any, **kwargs: Any) -> list[int]:
            ids = super().tok_encode(*args, **kwargs)
            require_known_tokens(ids, model.config.vocab_size, tokenizer)
            return ids

        def tok_batch_encode(self, *args: Any, **kwargs: Any) -> Any:
            ids, mask = super().tok_batch_encode(*args, **kwargs)
            require_known_tokens(ids[mask.bool()].tolist(), model.config.vocab_size, tokenizer)
            return ids, mask

    # Older versions add BOS only to families whose name contains "gemma".
    add_bos = True if text_start(tokenizer) else None
    return CheckedModel(
        pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device=str(model.device), add_bos_token=add_bos
    )


@contextlib.contextmanager
def _fixed_depth(model: PreTrainedModel, depth: int | None) -> Iterator[None]:
    """Context in which every call exits after ``depth`` (None: runs all recursions), whatever the config says."""
    if model.config.model_type != "recursive":
        yield
        return
    before = model.config.exit_depth
    model.config.exit_depth = depth
    try:
        model.config.depth_to_exit_at()
        yield
    finally:
        model.config.exit_depth = before


@contextlib.contextmanager
def _quiet_lm_eval() -> Iterator[None]:
    """Context without lm-eval's warnings, one per default that it uses."""
    lm_eval_logger = logging.getLogger("lm_eval")
    before = lm_eval_logger.level
    lm_eval_logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        lm_eval_logger.setLevel(before)


def _scores(results: dict[str, Any]) -> Iterator[Score]:
    for task, figures in results["results"].items():
        for key, value in figures.items():
            metric, _, kind = key.partition(",")
            if key in NOT_METRICS or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = figures.get(f"{metric}_stderr,{kind}")
            samples = results.get("n-samples", {}).get(task, {})
            yield Score(
                task=task,
                metric=metric if kind in ("", "none") else key,
                value=float(value),
                stderr=float(stderr) if isinstance(stderr, int | float) else None,
                num_samples=int(samples.get("effective", 0)),
                num_fewshot=int(results.get("n-shot", {}).get(task, 0)),
            )
