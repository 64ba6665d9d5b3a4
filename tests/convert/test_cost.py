"""Estimated costs: counted operations of shapes known by hand, and their change with the plan."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from helpers.tiny_models import save_tiny
from recursify.convert import cost
from recursify.convert.cost import (
    CostEstimate,
    LayerShape,
    MapShape,
    Work,
    drift_work,
    estimate_costs,
    layer_shapes,
    low_rank_work,
    moment_work,
    refit_work,
    share_work,
)
from recursify.convert.pipeline import plan_conversion

SPEEDS = {torch.float32: 1e9, torch.float64: 2.5e8}


def speed(dtype: torch.dtype, device: str) -> float:
    """A GPU ten times as fast as the CPU."""
    return SPEEDS[dtype] * (10 if device == "cuda" else 1)


def plan_of(folder, **options):
    return plan_conversion(folder, **{"num_recursions": 2, "lora_rank": 4, **options})


def estimate(plan, **options) -> CostEstimate:
    (found,) = estimate_costs(plan, devices=["cpu"], speed=speed, **options)
    return found


def test_layer_pass_by_hand():
    """Two operations per weight and token; queries with keys and weights with values, over the window; and outputs."""
    layer = LayerShape([[MapShape(8, 4, 0), MapShape(2, 4, 0)], [MapShape(4, 8, 0)]], attention=6)
    assert layer.size == 32 + 8 + 32
    assert layer.run(10, 5) == Work(2 * 10 * 72 + 2 * (2 * 10 * 5 * 6) + cost.ELEMENT * 10 * (8 + 2 + 4))


@pytest.mark.parametrize(("width", "columns"), [(600, 600 + 512), (100, 100 + 100)])
def test_second_moment_by_hand(width, columns):
    """Half of a full product, and half of the blocks on the diagonal."""
    assert moment_work(10, width) == Work(10 * width * columns)


def test_low_rank_by_hand():
    """Subspace iteration below a quarter of the smaller side, LAPACK above, nothing at full rank."""
    columns = 10 + 32
    product, gram = 2 * 100 * 200**2, 2 * 100 * 100 * 200
    steps = 5 * (2 * 100 * 100 * columns + 10 * 100 * columns**2)
    assert low_rank_work(MapShape(100, 200, 10), 10) == Work(product + gram + steps + 2 * 10 * 100 * 200)
    in_tokens = low_rank_work(MapShape(100, 200, 10), 10, 30)
    assert in_tokens == Work(4 * 100 * 200 * 30 + gram + steps + 2 * 10 * 100 * 200)
    by_lapack = 2 * 100 * 100 * 200 + 12 * 100**3
    assert low_rank_work(MapShape(100, 200, 50), 50) == Work(2 * 100 * 200**2, by_lapack)
    assert low_rank_work(MapShape(100, 200, 100), 100) == low_rank_work(MapShape(100, 200, 0), 0) == Work()


def test_refit_by_hand():
    """A norm, one regression for all maps of a stage or one by the map's own errors, and factors."""
    one, other = MapShape(30, 40, 40), MapShape(50, 40, 40)  # full rank: no factors to find
    alone = refit_work([one], 1000)
    products = 2 * 1000 * 30 * 40 * 2 + 1000 * 40 * 80
    assert alone == Work(products, pytest.approx(2 / 3 * 40**3 + 3 * 30 * 40**2))
    together = refit_work([one, other], 1000)
    products = 2 * 1000 * 40 * 40 + 2 * 40 * 40 * (30 + 50) + 1000 * 40 * 80
    assert together == Work(products, pytest.approx(2 / 3 * 40**3 + 3 * 40**3))
    few = refit_work([one], 20)
    products = 2 * 20 * 30 * 40 * 2 + 40 * 20 * 40
    assert few == Work(products, pytest.approx(2 / 3 * 20**3 + 3 * 30 * 20**2))
    assert refit_work([replace(one, rank=0)], 1000) == Work()


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_neox"])
def test_shapes_of_a_plan(family, tmp_path):
    """Stages of separate and of fused maps, with the ranks of the plan."""
    save_tiny(tmp_path, family)
    first = next(layer_shapes(plan_of(tmp_path, lora_rank_pattern={"mlp.down_proj": 2})))
    widths = {
        "llama": [([32, 16, 16], 32), ([32], 32), ([48, 48], 32), ([32], 48)],
        "phi3": [([32], 32), ([64], 32), ([96], 32), ([32], 48)],
        "gpt_neox": [([96], 32), ([32], 32), ([48], 32), ([32], 48)],
    }[family]
    assert [([shape.outputs for shape in stage], stage[0].inputs) for stage in first.stages] == widths
    assert first.attention == 32
    assert {shape.rank for shape in first.maps[:-1]} == {4}
    assert first.maps[-1].rank == (4 if family == "gpt_neox" else 2)


def test_walk_and_passes_of_layouts(tiny_llama):
    """A cycle walks to the start of the last recursion, a sequence to that of the block; without drift one pass."""
    cycle = plan_of(tiny_llama, sharing="cycle", calibration_tokens=1024)
    sequence = plan_of(tiny_llama, sharing="sequence", calibration_tokens=1024)
    layers = list(layer_shapes(cycle))
    run = layers[0].run(1024, 256).float32
    works = [share_work(plan, layers).float32 for plan in (cycle, sequence)]
    assert works[0] - works[1] == pytest.approx(3 * run)
    assert drift_work(plan_of(tiny_llama, drift_correction=False), layers) == Work()
    assert drift_work(plan_of(tiny_llama, lora_rank=0), layers) == Work()


def test_estimate_follows_the_plan(tiny_llama, tmp_path):
    """More with more tokens, recursions fitted and ranks; the check adds; the disk is the plan's."""
    plan = plan_of(tiny_llama)
    found = estimate(plan)
    assert found.disk_bytes == plan.recursive.num_bytes
    assert found.seconds > estimate(plan, check=False).seconds > 0
    fewer = plan_of(tiny_llama, calibration_tokens=4096)
    assert found.seconds > estimate(fewer).seconds > estimate(plan_of(tiny_llama, calibration_data=())).seconds
    assert estimate(plan, check=False).peak_bytes > estimate(fewer, check=False).peak_bytes > cost.PROCESS_BYTES
    assert estimate(plan_of(tiny_llama, lora_rank=0)).seconds < found.seconds
    save_tiny(tmp_path, hidden_size=64, intermediate_size=96)
    wider = estimate(plan_of(tmp_path))
    assert wider.seconds > found.seconds
    assert wider.peak_bytes > found.peak_bytes
    assert wider.disk_bytes > found.disk_bytes


def test_seconds_by_hand(tiny_llama):
    """Operations over speeds, by dtype."""
    plan = plan_of(tiny_llama)
    layers = list(layer_shapes(plan))
    work = share_work(plan, layers) + drift_work(plan, layers)
    assert estimate(plan, check=False).seconds == pytest.approx(work.float32 / 1e9 + work.float64 / 2.5e8)


def test_devices(tiny_llama, monkeypatch):
    """The CPU, and a GPU if there is one and the conversion uses it; the check stays on the CPU."""
    plan = plan_of(tiny_llama)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [found.device for found in estimate_costs(plan, speed=speed)] == ["cpu"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    host, device = estimate_costs(plan, speed=speed)
    assert (host.device, device.device) == ("cpu", "cuda")
    assert host.seconds / 10 < device.seconds < host.seconds
    assert device.peak_bytes < cost.PROCESS_BYTES < host.peak_bytes
    assert [found.device for found in estimate_costs(plan_of(tiny_llama, calibration_data=()), speed=speed)] == ["cpu"]


def test_speeds_are_measured_for_estimates_alone(tiny_llama, monkeypatch):
    """A plan times nothing; an estimate times each dtype once."""
    calls = []

    def measure(dtype: torch.dtype, device: str) -> float:
        calls.append((dtype, device))
        return 1e9

    monkeypatch.setattr(cost, "measure_speed", measure)
    plan = plan_of(tiny_llama)
    assert not calls
    estimate_costs(plan, devices=["cpu"])
    assert sorted(calls, key=str) == [(torch.float32, "cpu"), (torch.float64, "cpu")]


def test_measured_speed():
    """A number of operations that a processor can do in a second."""
    assert 1e6 < cost.measure_speed(torch.float32, "cpu") < 1e15


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "1 s"), (45.4, "45 s"), (99.9, "100 s"), (150, "2.5 min"), (7100, "118 min"), (9000, "2.5 h")],
)
def test_printed_estimate(seconds, text):
    """Rounded to what an estimate knows."""
    found = CostEstimate(device="cpu", seconds=seconds, peak_bytes=1_900_000_000, disk_bytes=442_000_000)
    assert str(found) == f"about {text}, 1.9 GB of memory, 0.4 GB on disk"
