"""The engine's two loops decide by the exit rule of ``recursify.modeling``, as ``generate`` does."""

from __future__ import annotations

import pytest

from helpers.small_engine import prompts, recursive, small_engine
from recursify.engine import SamplingParams


@pytest.mark.parametrize(("device_loop", "module"), [(False, "early_exit"), (True, "device_loop.loop")])
def test_the_engine_exits_by_the_one_rule(device_loop, module, monkeypatch):
    params = SamplingParams(max_tokens=5, exit="fixed")

    def exit_depths():
        engine = small_engine(recursive(recursions=4, ends=1), device_loop=device_loop)
        return {depth for output in engine.generate(prompts(4, 6), params) for depth in output.depths[1:]}

    assert exit_depths() == {0}
    monkeypatch.setattr(f"recursify.engine.{module}.decide_exits", lambda _, limits: limits.depth >= 2)
    assert exit_depths() == {2}
