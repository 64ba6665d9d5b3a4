"""Several processes on one machine."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from recursify.uptrain.launch import first_failure


@dataclass
class Failure:
    """Stand-in for torch's ``ProcessFailure``."""

    exitcode: int
    timestamp: int


@pytest.mark.parametrize(
    ("failures", "expected"),
    [
        ({0: Failure(1, 100), 1: Failure(-9, 100)}, (1, -9)),  # rank 0 lost its peer within the same second
        ({0: Failure(-15, 100), 1: Failure(1, 100)}, (1, 1)),  # rank 0 was ended by the launcher
        ({1: Failure(-15, 101), 0: Failure(1, 100)}, (0, 1)),
        ({0: Failure(-9, 130), 1: Failure(1, 100)}, (1, 1)),  # the launcher's SIGKILL, after its SIGTERM did nothing
        ({0: Failure(-11, 101), 1: Failure(1, 100)}, (0, -11)),
    ],
)
def test_the_first_rank_to_fail_is_named(failures, expected):
    """Whatever order torch lists them in: it dates failures by whole seconds."""
    assert first_failure(failures) == expected
    assert first_failure(dict(reversed(failures.items()))) == expected
