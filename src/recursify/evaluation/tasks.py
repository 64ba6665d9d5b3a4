"""Tasks of lm-evaluation-harness, at several depths of a recursive model and on its dense control."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from recursify.errors import SettingsError, TextError

NOT_METRICS = ("alias", "name", "sample_len", "sample_count")


@dataclass(frozen=True)
class Score:
    """One metric of one task.

    Attributes:
        task: Its name in lm-eval.
        metric: The metric's (``acc``, ``acc_norm``, ``exact_match``), with lm-eval's filter behind a comma if it is
            another than ``none``.
        value: As lm-eval gives it.
        stderr: One standard error, where lm-eval has one.
        num_samples: Samples scored.
        num_fewshot: Solved examples in the prompt.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    num_samples: int
    num_fewshot: int

    def as_evaluation(self, depth: int | None, control: Score | None) -> dict[str, Any]:
        """As an entry of ``evaluation`` in ``recursify.json``, beside the dense model's score."""
        facts = asdict(self)
        return {
            "kind": "task",
            "name": facts.pop("task"),
            **facts,
            "depth": depth,
            "dense_value": None if control is None else control.value,
            "dense_stderr": None if control is None else control.stderr,
            "lm_eval": version("lm_eval"),
        }


def format_score(value: float, stderr: float | None) -> str:
    """A score, and one standard error where there is one."""
    return f"{value:.4f}" if stderr is None else f"{value:.4f} ± {stderr:.4f}"


def require_lm_eval() -> None:
    """Raises:
    SettingsError: lm-eval is not installed.
    """
    try:
        version("lm_eval")
    except PackageNotFoundError as error:
        raise SettingsError(
            "Tasks are scored by lm-evaluation-harness, which is not installed. Run: pip install 'recursify[eval]'"
        ) from error


class TaskRunner:
    """Scores models on the same tasks.

    Args:
        tasks: Names of lm-eval's tasks and groups, or of those in ``include_path``.
        include_path: A folder with further tasks (YAML).
        num_fewshot: Solved examples in the prompt; None takes each task's own.
        limit: Samples of each task at most.
        batch_size: Sequences at a time.

    Raises:
        SettingsError: lm-eval is not installed, or knows no such task.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        include_path: Path | None = None,
        num_fewshot: int | None = None,
        limit: int | None = None,
        batch_size: int = 8,
    ):
        require_lm_eval()
        from lm_eval.tasks import TaskManager

        if include_path is not None and not include_path.is_dir():
            raise SettingsError(f"--include-path '{include_path}' is no folder. Give one with task files (YAML).")
        # lm-eval's own tasks take seconds to index, and a folder of one's own may be all that is needed.
        include = None if include_path is None else str(include_path)
        self.manager = TaskManager(include_path=include, include_defaults=False)
        if not set(tasks) <= set(self.manager.all_tasks):
            self.manager = TaskManager(include_path=include)
        if unknown := [name for name in tasks if name not in self.manager.all_tasks]:
            raise SettingsError(
                f"lm-eval knows no task '{unknown[0]}'. List those it knows with: lm-eval ls tasks. Tasks of your own "
                f"are found in --include-path."
            )
        self.tasks = list(tasks)
        self.num_fewshot = num_fewshot
        self.limit = limit
        self.batch_size = batch_size

    def score(self, model: PreTrainedModel, tokenizer: Any, depth: int | None = None) -> list[Score]:
        """All metrics of all tasks; with a ``depth``, every token of ``model`` exits there.

        Raises:
            TextError: A task's data cannot be had.
            ValueError: The model has no exit after that depth.
        """
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        with _fixed_depth(model, depth), _quiet():
            runner = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=self.batch_size, device=str(model.device))
            try:
                results = simple_evaluate(
                    model=runner,
                    tasks=self.tasks,
                    task_manager=self.manager,
                    num_fewshot=self.num_fewshot,
                    limit=self.limit,
                    log_samples=False,
                )
            except (OSError, ValueError) as error:
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise TextError(
                    f"The tasks {', '.join(self.tasks)} could not be run: {reason} Offline, a task needs its data in "
                    f"the cache of datasets, or in files named by its YAML."
                ) from error
        return list(_scores(results))


@contextlib.contextmanager
def _fixed_depth(model: PreTrainedModel, depth: int | None) -> Iterator[None]:
    """Every call runs as far as the exit after ``depth``, or all recursions, whatever the config says otherwise."""
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
def _quiet() -> Iterator[None]:
    """lm-eval warns of every default it takes."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


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
