"""Sampling parameters: their ranges."""

import pytest

from recursify.engine import SamplingParams
from recursify.errors import EngineError


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be a whole number of at least 1, got 0"),
        ({"temperature": -1.0}, "temperature must be a number of at least 0, got -1"),
        ({"top_p": 0.0}, "top_p must be a number above 0 and at most 1, got 0"),
        ({"top_p": 1.5}, "top_p must be a number above 0 and at most 1, got 1.5"),
        ({"top_k": -1}, "top_k must be a whole number of at least 0, got -1"),
        ({"logprobs": 21}, "logprobs must be a whole number of at least 0 and at most 20, got 21"),
        ({"max_depth": -1}, "max_depth must be a whole number of at least 0, got -1"),
        ({"max_tokens": 2.5}, "max_tokens must be a whole number of at least 1, got 2.5"),
        (
            {"seed": 2**70},
            "seed must be a whole number of at least 0 and at most 9223372036854775807, got 1180591620717411303424",
        ),
        ({"seed": "x"}, "seed must be a whole number of at least 0 and at most .*, got 'x'"),
        (
            {"stop_token_ids": 5},
            "stop_token_ids must be a list whose entries are each a whole number of at least 0, got 5",
        ),
        (
            {"forced_depths": (-3,)},
            "forced_depths must be a list whose entries are each a whole number of at least 0, got -3",
        ),
        ({"forced_depths": (0,), "max_depth": 1}, "forced_depths take the place of exit and max_depth"),
        ({"stop": "x"}, "stop must be a list whose entries are each a non-empty string, got 'x'"),
        ({"stop": ("",)}, "stop must be a list whose entries are each a non-empty string, got ''"),
        ({"max_tokens": True}, "max_tokens must be a whole number of at least 1, got True"),
        ({"max_token": 3}, "Unknown setting 'max_token'. Did you mean 'max_tokens'"),
        ({"forced_depths": ()}, "name at least one depth"),
        ({"temperature": float("nan")}, "temperature must be a number of at least 0, got nan"),
    ],
)
def test_sampling_values_out_of_range(values, message):
    with pytest.raises(EngineError, match=message):
        SamplingParams(**values)
