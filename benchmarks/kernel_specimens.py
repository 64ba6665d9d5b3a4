"""Kernel calls at the sizes of real models, on any device, to be timed and compiled ahead of time.

Sizes: 8B is Llama-3.1-8B (hidden 4096, 32 heads over 8 of 128, vocabulary 128,256); 1.7B is SmolLM2-1.7B (hidden 2048,
32 heads of 64, vocabulary 49,152); gemma is Gemma-2-2B's attention (8 heads over 4 of 256, soft-capped, window 4096).

Shape legend: N rows, H hidden size, V vocabulary, R recursions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from recursify.experiments.kernels.grouped_lora import add_depth_lora
from recursify.experiments.kernels.route import gather_normed, scatter_gated
from recursify.experiments.kernels.route.reference import gated
from recursify.kernels.depth_norm import add_and_norm
from recursify.kernels.exit_head import exit_statistics
from recursify.kernels.kv_write import store_keys_and_values
from recursify.kernels.paged_attention import attend_pages
from recursify.kernels.slot_advance import OutputRing, Slots, advance_slots

DTYPE = torch.bfloat16
WIDTH = DTYPE.itemsize
RECURSIONS = 3

Forms = dict[str, Callable[[], Any]]
"""Implementations of one call: ``triton``, ``torch``, and ``library`` where a library has one."""


@dataclass(frozen=True)
class Specimen:
    """One kernel call.

    Attributes:
        kernel: Folder of the kernel.
        case: Sizes and options that tell this call from others.
        build: Function that makes the tensors on a device and returns the calls.
        moved: Minimum number of bytes to read and write.
        operations: Floating-point operations of the matrix products.
        waits: The PyTorch form synchronizes with the device, so it cannot be captured in a graph.
    """

    kernel: str
    case: str
    build: Callable[[torch.device], Forms]
    moved: int
    operations: int = 0
    waits: bool = False


def randn(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=DTYPE, device=device)


def zeros(device: torch.device, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.zeros(*shape, dtype=dtype, device=device)


def both(function: Callable[..., Any], *arguments: Any, **settings: Any) -> Forms:
    """The kernel and its reference."""
    return {
        "triton": lambda: function(*arguments, **settings, implementation="triton"),
        "torch": lambda: function(*arguments, **settings, implementation="reference"),
    }


def exit_head(model: str, rows: int, softcap: float | None = None) -> Specimen:
    size, entries = {"8B": (4096, 128_256), "1.7B": (2048, 49_152)}[model]

    def build(device: torch.device) -> Forms:
        states, weight = randn(device, rows, size), randn(device, entries, size) / size**0.5
        return both(exit_statistics, states, weight, softcap=softcap)

    case = f"{model}, {rows} rows" + (f", softcap {softcap:g}" if softcap else "")
    return Specimen("exit_head", case, build, WIDTH * size * (entries + rows), 2 * rows * size * entries)


def paged_attention(model: str, rows: int, context: int, *, window: int | None = None, page_size: int = 16) -> Specimen:
    """Rows at mixed depths, each of another sequence with ``context`` keys."""
    heads, kv_heads, size, softcap = {
        "8B": (32, 8, 128, None),
        "1.7B": (32, 32, 64, None),
        "gemma": (8, 4, 256, 50.0),
    }[model]
    blocks = context // page_size
    pool = rows * blocks

    def build(device: torch.device) -> Forms:
        query = randn(device, rows, heads, size)
        keys, values = (randn(device, RECURSIONS * pool, page_size, kv_heads, size) for _ in range(2))
        table = torch.randperm(pool, device=device).view(rows, blocks).int()
        depth = torch.arange(rows, device=device, dtype=torch.int32) % RECURSIONS
        offsets = torch.arange(RECURSIONS, device=device, dtype=torch.int32) * pool
        lengths = torch.full((rows,), context, device=device, dtype=torch.int32)
        arguments = (query, keys, values, table, depth, offsets, lengths)
        forms = both(attend_pages, *arguments, window=window, softcap=softcap)
        if not (window or softcap) and query.is_cuda:
            forms["library"] = library_attention(*arguments, context)
        return forms

    seen = min(context, window or context)
    case = f"{model}, {rows} rows, {context} keys" + (f", window {window}" if window else "")
    moved = WIDTH * rows * (2 * seen * kv_heads * size + 2 * heads * size)
    return Specimen("paged_attention", case, build, moved, 4 * rows * heads * size * seen)


def library_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    depth: Tensor,
    offsets: Tensor,
    lengths: Tensor,
    context: int,
) -> Callable[[], Any]:
    """PyTorch's paged attention, which handles mixed depths once offsets are added to the table."""
    rows = torch.arange(len(query) + 1, device=query.device, dtype=torch.int32)
    shifted = table + offsets[depth.long()][:, None]

    def attend() -> Tensor:
        from torch.nn.attention.varlen import varlen_attn  # over pages since torch 2.12

        arguments = (query, keys, values, rows, None, 1, context)
        return varlen_attn(*arguments, seqused_k=lengths, block_table=shifted, enable_gqa=True)

    return attend


def kv_write(rows: int) -> Specimen:
    """Keys and values of the 8B model, rows at mixed depths."""
    heads, size, page_size = 8, 128, 16

    def build(device: torch.device) -> Forms:
        key, value = (randn(device, rows, heads, size) for _ in range(2))
        pages = [randn(device, RECURSIONS * rows, page_size, heads, size) for _ in range(2)]
        slots = torch.randperm(rows * page_size, device=device)[:rows]
        depth = torch.arange(rows, device=device, dtype=torch.int32) % RECURSIONS
        offsets = torch.arange(RECURSIONS, device=device, dtype=torch.int32) * rows
        forms = both(store_keys_and_values, key, value, *pages, slots, depth, offsets)
        # The reference filters rows that write nothing, which waits for the device; every row writes here.
        target = slots + offsets.long()[depth.long()] * page_size

        def in_torch() -> None:
            for new, tensor in zip((key, value), pages, strict=True):
                tensor.flatten(0, 1).index_copy_(0, target, new)

        return forms | {"torch": in_torch}

    return Specimen("kv_write", f"8B, {rows} rows", build, WIDTH * rows * 4 * heads * size)


def depth_norm(rows: int, size: int = 4096) -> Specimen:
    def build(device: torch.device) -> Forms:
        states, residual = (randn(device, rows, size) for _ in range(2))
        weight = randn(device, RECURSIONS, size)
        depth = torch.arange(rows, device=device, dtype=torch.int32) % RECURSIONS
        return both(add_and_norm, states, residual, weight, depth)

    return Specimen("depth_norm", f"8B, {rows} rows", build, WIDTH * 4 * rows * size)


def grouped_lora(rows: int, rank: int, inputs: int = 4096, outputs: int = 4096) -> Specimen:
    """One projection of the 8B model, rows at mixed depths."""

    def build(device: torch.device) -> Forms:
        y, x = randn(device, rows, outputs), randn(device, rows, inputs)
        a = randn(device, RECURSIONS, rank, inputs) / inputs**0.5
        b = randn(device, RECURSIONS, outputs, rank) / rank**0.5
        depth = torch.arange(rows, device=device, dtype=torch.int32) % RECURSIONS
        forms = both(add_depth_lora, y, x, a, b, depth)
        # Rows are sorted once for all projections of a layer, so sorting is not timed.
        order = depth.sort(stable=True).indices
        ends = torch.bincount(depth, minlength=RECURSIONS).cumsum(0).int() if device.type != "meta" else depth

        def grouped() -> None:
            inner = F.grouped_mm(x[order], a.transpose(1, 2), offs=ends)
            y.index_add_(0, order, F.grouped_mm(inner, b.transpose(1, 2), offs=ends))

        return forms | {"library": grouped}

    touched = min(rows, RECURSIONS) * rank * (inputs + outputs)
    moved = WIDTH * (touched + rows * (inputs + 2 * outputs))
    return Specimen("grouped_lora", f"8B, {rows} rows, rank {rank}", build, moved, 2 * rows * rank * (inputs + outputs))


def route_gather(rows: int, size: int = 4096) -> Specimen:
    """Gather half of the rows, normed like the input of a layer."""

    def build(device: torch.device) -> Forms:
        states, weight = randn(device, 2 * rows, size), randn(device, size)
        taken = torch.randperm(2 * rows, device=device)[:rows]
        return both(gather_normed, states, taken, weight)

    return Specimen("route", f"8B, gather {rows} rows", build, WIDTH * 3 * rows * size)


def route_scatter(rows: int, size: int = 4096) -> Specimen:
    """Scatter half of the rows with a residual gate."""

    def build(device: torch.device) -> Forms:
        states, made = randn(device, 2 * rows, size), randn(device, rows, size)
        taken, gate = torch.randperm(2 * rows, device=device)[:rows], torch.zeros(rows, device=device)
        forms = both(scatter_gated, states, made, gate, taken)
        # The reference filters negative rows, which waits for the device; there are none here.
        return forms | {"torch": lambda: states.index_copy_(0, taken, gated(states[taken], made, gate, "residual"))}

    return Specimen("route", f"8B, scatter {rows} rows", build, WIDTH * 3 * rows * size)


def slot_advance(count: int) -> Specimen:
    """All slots active; the bytes moved are negligible beside the launch."""

    def build(device: torch.device) -> Forms:
        slots, ring = Slots.empty(count, device), OutputRing.empty(4 * count, device)
        slots.active.fill_(True)
        settings = {
            "waits": torch.arange(count, device=device) % 5 == 0,
            "limits": torch.full((count,), 2**30, device=device, dtype=torch.int32),
            "ends": torch.full((8,), -1, device=device, dtype=torch.int64),
            "block_table": torch.zeros(count, 256, device=device, dtype=torch.int32),
            "page_size": 16,
            "num_depths": RECURSIONS,
            "ring": ring,
        }
        leaves = torch.arange(count, device=device) % 2 == 0
        choices = torch.arange(count, device=device)
        return both(advance_slots, slots, leaves, choices, **settings)

    return Specimen("slot_advance", f"{count} slots", build, 64 * count, waits=True)


SPECIMENS = [
    *(exit_head("8B", rows) for rows in (1, 64, 256)),
    exit_head("1.7B", 64),
    exit_head("8B", 64, softcap=30.0),
    *(paged_attention("8B", rows, context) for rows, context in ((1, 4096), (64, 1024), (256, 1024))),
    paged_attention("1.7B", 64, 1024),
    paged_attention("gemma", 64, 4096, window=1024),
    *(kv_write(rows) for rows in (64, 8192)),
    *(depth_norm(rows) for rows in (64, 8192)),
    *(grouped_lora(rows, rank) for rows, rank in ((64, 16), (64, 64), (64, 256), (2048, 64))),
    *(make(rows) for make in (route_gather, route_scatter) for rows in (64, 8192)),
    *(slot_advance(count) for count in (64, 1024)),
]
"""Calls that are timed and compiled ahead of time."""


def attention_variant(at: torch.device, **settings: Any) -> Forms:
    """64 rows of the 8B model with further keywords; a tuple among them is the shape of an integer tensor."""
    keywords = {name: zeros(at, *value) if isinstance(value, tuple) else value for name, value in settings.items()}
    pages = (randn(at, 100, 16, 8, 128) for _ in range(2))
    places = (zeros(at, 64, 64), zeros(at, 64), zeros(at, RECURSIONS), zeros(at, 64))
    return both(attend_pages, randn(at, 64, 32, 128), *pages, *places, **keywords)


def store_variant(at: torch.device) -> Forms:
    """Heads of size 80."""
    tensors = (randn(at, *shape) for shape in (*2 * [(64, 8, 80)], *2 * [(100, 16, 8, 80)]))
    return both(store_keys_and_values, *tensors, zeros(at, 64, dtype=torch.int64), zeros(at, 64), zeros(at, RECURSIONS))


def norm_variant(at: torch.device) -> Forms:
    """Gemma's scale, no residual."""
    return both(add_and_norm, randn(at, 64, 2304), None, randn(at, RECURSIONS, 2304), zeros(at, 64), adds_one=True)


VARIANTS = [
    Specimen(
        "exit_head",
        "a bias",
        lambda at: both(exit_statistics, randn(at, 64, 2304), randn(at, 50_000, 2304), randn(at, 50_000)),
        0,
    ),
    Specimen(
        "paged_attention",
        "packed, a window",
        lambda at: attention_variant(at, window=512, key_positions=(100, 16), positions=(64,)),
        0,
    ),
    Specimen("paged_attention", "a window per row", lambda at: attention_variant(at, window=(64,)), 0),
    Specimen("kv_write", "heads of 80", store_variant, 0),
    Specimen("depth_norm", "no residual, 1 + weight", norm_variant, 0),
    Specimen("route", "gather, no weight", lambda at: both(gather_normed, randn(at, 64, 2304), zeros(at, 64)), 0),
    Specimen(
        "route",
        "scatter, mor",
        lambda at: both(
            scatter_gated, *(randn(at, 64, 2304) for _ in range(2)), randn(at, 64), zeros(at, 64), kind="mor"
        ),
        0,
    ),
]
"""Further ways to call a kernel, compiled ahead of time and not timed."""
