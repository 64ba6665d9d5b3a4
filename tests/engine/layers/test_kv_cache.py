"""The KV cache: its size by mode."""

import pytest

from helpers.small_engine import recursive
from recursify.engine import Engine


def test_memory_of_routed_models():
    """A routed model's deeper pages are fewer, by its capacities; with shared keys there are none."""
    sizes = {}
    for kv in ("deferred", "recursion_wise", "shared"):
        model = recursive(recursions=3, ends=0)
        if kv != "deferred":
            model.add_routers("expert_choice", router_kv=kv)
        sizes[kv] = Engine(model, num_pages=1000, page_size=4, max_model_len=64).kv_cache.num_bytes
    assert sizes["shared"] / sizes["deferred"] == pytest.approx(1 / 3)
    assert sizes["recursion_wise"] / sizes["deferred"] == pytest.approx((1 + 1.1 * 2 / 3 + 1.1 / 3) / 3, rel=1e-2)
