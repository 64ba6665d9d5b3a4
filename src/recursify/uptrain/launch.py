"""Several training processes on this machine, by torch's elastic launcher."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

from recursify.errors import SettingsError, TrainingError

from .settings import UptrainSettings


def is_launched() -> bool:
    """Tell whether a launcher (this one, ``accelerate launch`` or torchrun) started this process."""
    return "LOCAL_RANK" in os.environ


def is_main_process() -> bool:
    """Tell whether this is the only process, or rank 0 of several."""
    return os.environ.get("RANK", "0") == "0"


def launch(num_processes: int, arguments: Sequence[str], settings: UptrainSettings) -> None:
    """Run ``python ARGUMENTS`` in several processes; when one fails, terminate the others.

    Args:
        num_processes: Number of processes.
        arguments: Arguments of the Python interpreter.
        settings: Settings of the run, checked once before the processes start.

    Raises:
        TrainingError: One of them failed; the message names its rank.
        SettingsError: The settings are invalid, or the processes cannot be started.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from .run import check_settings

    check_settings(settings)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=1,
    )
    try:
        elastic_launch(config, sys.executable)(*arguments)
    except ChildFailedError as error:
        rank, exit_code = first_failure(error.failures)
        raise TrainingError(
            f"Rank {rank} of {num_processes} ended with exit code {exit_code}, and the others were terminated. See its "
            f"own message above. Checkpoints are intact: continue with --resume."
        ) from error
    except ValueError as error:
        raise SettingsError(f"Cannot start {num_processes} processes: {error}") from error


def first_failure(failures: dict[int, Any]) -> tuple[int, int]:
    """Rank and exit code of the process that failed first.

    torch dates failures by whole seconds, and a process that loses a peer fails within one. But that process exits with
    an error of its own, and the launcher terminates the others by SIGTERM, and by SIGKILL half a minute later. So a
    process that was killed by another signal, or by SIGKILL at once, was the first.

    Args:
        failures: Mapping from ranks to torch's ``ProcessFailure``.
    """
    first = min(failure.timestamp for failure in failures.values())

    def order(failure: Any) -> tuple[bool, int, bool]:
        killed = failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM and failure.timestamp < first + 10
        return not killed, failure.timestamp, failure.exitcode == -signal.SIGTERM

    rank = min(failures, key=lambda rank: order(failures[rank]))
    return rank, failures[rank].exitcode
