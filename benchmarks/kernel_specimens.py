"""Calls of the kernels at the sizes of real models, on any device: to time, and to compile ahead of time.

Sizes: 8B is Llama-3.1-8B (hidden 4096, 32 heads over 8 of 128, vocabulary 128,256); 1.7B is SmolLM2-1.7B (hidden 2048,
32 heads of 64, vocabulary 49,152); gemma is Gemma-2-2B's attention (8 heads over 4 of 256, soft-capped, window 4096).

Shape legend: N rows, H hidden size, V vocabulary, R recursions.
"""

from __future__ import annotations

import functools
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
from recursify.kernels.paged_attention import attend_pages
from recursify.kernels.rope_store import store_keys_and_values
from recursify.kernels.rope_store.reference import rotated
from recursify.kernels.slot_advance import OutputRing, Slots, advance_slots

DTYPE = torch.bfloat16
WIDTH = DTYPE.itemsize
RECURSIONS = 3

Forms = dict[str, Callable[[], Any]]
"""The same call as ``triton``, in ``torch``, and by a ``library`` where there is one."""


@dataclass(frozen=True)
class Specimen:
    """One call.

    Attributes:
        kernel: Its folder.
        case: What is special about it.
        build: Makes the tensors on a device, and returns the calls.
        moved: Bytes that have to be read and written at the least.
        operations: Floating-point operations of its matrix products.
        waits: The form in PyTorch waits for the device, so that no graph can be made of it.
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
    """A kernel and its reference."""
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


def paged_attention(
    model: str, rows: int, context: int, *, window: int | None = None, latest: bool = False, page_size: int = 16
) -> Specimen:
    """Rows at mixed depths, each at the end of a context of its own."""
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
        exited = None
        if latest:
            exited = torch.randint(0, RECURSIONS, (pool, page_size), device=device).to(torch.int8)
        given = (query, keys, values, table, depth, offsets, lengths)
        forms = both(attend_pages, *given, window=window, softcap=softcap, exit_depths=exited)
        if not (latest or window or softcap) and query.is_cuda:
            forms["library"] = library_attention(*given, context)
        return forms

    seen = min(context, window or context)
    case = f"{model}, {rows} rows, {context} keys" + (f", window {window}" if window else "")
    moved = WIDTH * rows * (2 * seen * kv_heads * size + 2 * heads * size)
    return Specimen(
        "paged_attention", case + (", latest" if latest else ""), build, moved, 4 * rows * heads * size * seen
    )


def prompt_attention(rows: int, group: int = 16) -> Specimen:
    """The rows of one prompt of the 8B model, at one depth; a row sees half of them on average."""
    heads, kv_heads, size, page_size = 32, 8, 128, 16

    def build(device: torch.device) -> Forms:
        query = randn(device, rows, heads, size)
        keys, values = (randn(device, rows // page_size, page_size, kv_heads, size) for _ in range(2))
        table = torch.arange(rows // page_size, device=device, dtype=torch.int32).expand(rows, -1)
        depth, lengths = zeros(device, rows), torch.arange(1, rows + 1, device=device, dtype=torch.int32)
        forms = both(attend_pages, query, keys, values, table, depth, zeros(device, 1), lengths, group=group)
        side_by_side = [held.flatten(0, 1).transpose(0, 1)[None] for held in (query[:, None], keys, values)]
        flash = functools.partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
        # The reference gathers every row's keys, 17 GB of them.
        return {"triton": forms["triton"], "torch": lambda: flash(*side_by_side)}

    moved = WIDTH * rows * size * (2 * heads + 2 * kv_heads)
    return Specimen("paged_attention", f"8B, a prompt of {rows} rows", build, moved, 2 * rows * rows * heads * size)


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
    """PyTorch's own attention over pages, which serves mixed depths once offsets are added to the table."""
    rows = torch.arange(len(query) + 1, device=query.device, dtype=torch.int32)
    shifted = table + offsets[depth.long()][:, None]

    def attend() -> Tensor:
        from torch.nn.attention.varlen import varlen_attn  # over pages since torch 2.12

        given = (query, keys, values, rows, None, 1, context)
        return varlen_attn(*given, seqused_k=lengths, block_table=shifted, enable_gqa=True)

    return attend


def rope_store(rows: int, depths: int = 1) -> Specimen:
    """Of the 8B model; ``depths`` at which each row writes."""
    heads, size, page_size = 8, 128, 16
    pool = rows  # pages

    def build(device: torch.device) -> Forms:
        key, value = (randn(device, rows, heads, size) for _ in range(2))
        pages = [randn(device, RECURSIONS * pool, page_size, heads, size) for _ in range(2)]
        slots = torch.randperm(pool * page_size, device=device)[:rows]
        depth = torch.arange(rows, device=device, dtype=torch.int32) % (RECURSIONS - depths + 1)
        offsets = torch.arange(RECURSIONS, device=device, dtype=torch.int32) * pool
        count = torch.full((rows,), depths, device=device, dtype=torch.int32)
        cos, sin = (randn(device, rows, size) for _ in range(2))
        given = (key, value, *pages, slots, depth, offsets)
        forms = both(store_keys_and_values, *given, count=count, cos=cos, sin=sin)
        shift = offsets.long() * page_size
        # The reference looks for rows that write nothing; here are none.
        targets = [slots + shift[depth.long() + level] for level in range(depths)]

        def in_torch() -> None:
            for new, held in zip((rotated(key, cos, sin), value), pages, strict=True):
                for target in targets:
                    held.flatten(0, 1).index_copy_(0, target, new)

        return forms | {"torch": in_torch}

    moved = WIDTH * rows * (2 * heads * size * (1 + depths) + 2 * size)
    return Specimen("rope_store", f"8B, {rows} rows, {depths} depths", build, moved)


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
        # Sorted once for all projections of a layer, so sorting is left out.
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
    """Half of the rows, normed as a layer's input is."""

    def build(device: torch.device) -> Forms:
        states, weight = randn(device, 2 * rows, size), randn(device, size)
        taken = torch.randperm(2 * rows, device=device)[:rows]
        return both(gather_normed, states, taken, weight)

    return Specimen("route", f"8B, gather {rows} rows", build, WIDTH * 3 * rows * size)


def route_scatter(rows: int, size: int = 4096) -> Specimen:
    """Half of the rows, put back with a residual gate."""

    def build(device: torch.device) -> Forms:
        states, made = randn(device, 2 * rows, size), randn(device, rows, size)
        taken, gate = torch.randperm(2 * rows, device=device)[:rows], torch.zeros(rows, device=device)
        forms = both(scatter_gated, states, made, gate, taken)
        # The reference looks for rows that are none; here are none.
        return forms | {"torch": lambda: states.index_copy_(0, taken, gated(states[taken], made, gate, "residual"))}

    return Specimen("route", f"8B, scatter {rows} rows", build, WIDTH * 3 * rows * size)


def slot_advance(count: int) -> Specimen:
    """All slots active; what it moves is nothing beside a launch."""

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
    paged_attention("8B", 64, 1024, latest=True),
    paged_attention("1.7B", 64, 1024),
    prompt_attention(2048),
    paged_attention("gemma", 64, 4096, window=1024),
    *(rope_store(rows, depths) for rows, depths in ((64, 1), (64, 2), (8192, 1))),
    *(depth_norm(rows) for rows in (64, 8192)),
    *(grouped_lora(rows, rank) for rows, rank in ((64, 16), (64, 64), (64, 256), (2048, 64))),
    *(make(rows) for make in (route_gather, route_scatter) for rows in (64, 8192)),
    *(slot_advance(count) for count in (64, 1024)),
]
"""What is timed, and compiled ahead of time."""


def attention_variant(at: torch.device, **settings: Any) -> Forms:
    """64 rows of the 8B model, with what ``settings`` add; a shape among them is one of integers."""
    given = {name: zeros(at, *value) if isinstance(value, tuple) else value for name, value in settings.items()}
    pages = (randn(at, 100, 16, 8, 128) for _ in range(2))
    places = (zeros(at, 64, 64), zeros(at, 64), zeros(at, RECURSIONS), zeros(at, 64))
    return both(attend_pages, randn(at, 64, 32, 128), *pages, *places, **given)


def store_variant(at: torch.device) -> Forms:
    """Heads of 80, rotated already."""
    held = (randn(at, *shape) for shape in (*2 * [(64, 8, 80)], *2 * [(100, 16, 8, 80)]))
    return both(store_keys_and_values, *held, zeros(at, 64, dtype=torch.int64), zeros(at, 64), zeros(at, RECURSIONS))


def norm_variant(at: torch.device) -> Forms:
    """Gemma's scale, without a residual."""
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
    Specimen("rope_store", "heads of 80, rotated already", store_variant, 0),
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
"""What is compiled beside, and not timed: the other ways that a kernel can be called in."""
