"""State machine of the slots in plain PyTorch.

Shape legend: S slots, M pages per slot, E EOS ids, C entries of the ring.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Slots:
    """State of the slots on the device. The tensors keep their addresses, and their contents change.

    Attributes:
        active: Bool ``[S]``: True if the slot takes part in the next iteration.
        token: Integers ``[S]``: id of the input token.
        depth: Integers ``[S]``: recursion that the token runs next.
        position: Integers ``[S]``: position of the token in its sequence.
        address: Integers ``[S]``: KV slot of the token, ``page id · page_size + index``, before the page offset of its
            depth; -1 for an inactive slot.
        finished: Bool ``[S]``: True after the last token.
    """

    active: Tensor
    token: Tensor
    depth: Tensor
    position: Tensor
    address: Tensor
    finished: Tensor

    @classmethod
    def empty(cls, count: int, device: torch.device | str | None = None) -> Slots:
        """Make ``count`` inactive slots."""
        flags = (torch.zeros(count, dtype=torch.bool, device=device) for _ in range(2))
        token, depth, position = (torch.zeros(count, dtype=torch.int32, device=device) for _ in range(3))
        address = torch.full((count,), -1, dtype=torch.int64, device=device)
        return cls(next(flags), token, depth, position, address, next(flags))


@dataclass(frozen=True)
class OutputRing:
    """Ring buffer of generated tokens, in order, which the host reads every few iterations.

    Attributes:
        entries: Int32 ``[C, 4]``: slot, token, exit depth, iteration. Entry ``n`` is at ``n % C``.
        counts: Int64 ``[2]``: number of entries and of iterations so far. At most ``C`` entries can be unread.
    """

    entries: Tensor
    counts: Tensor

    @classmethod
    def empty(cls, capacity: int, device: torch.device | str | None = None) -> OutputRing:
        """Make an empty ring of ``capacity`` entries."""
        entries = torch.zeros(capacity, 4, dtype=torch.int32, device=device)
        return cls(entries, torch.zeros(2, dtype=torch.int64, device=device))


def advance(
    slots: Slots, leaves: Tensor, choices: Tensor, waits: Tensor | None, limits: Tensor, ends: Tensor,
    block_table: Tensor, page_size: int, num_depths: int, ring: OutputRing,
) -> None:  # fmt: skip
    """Reference of :func:`recursify.kernels.slot_advance.advance_slots`."""
    moves = slots.active if waits is None else slots.active & ~waits
    leave = moves & (leaves | (slots.depth == num_depths - 1))
    stay = moves & ~leave
    _write(ring, leave, choices, slots.depth)
    token = torch.where(leave, choices.to(slots.token.dtype), slots.token)
    depth = torch.where(leave, 0, slots.depth + stay)
    position = slots.position + leave
    ended = leave & ((position >= limits) | torch.isin(choices, ends))
    page = (position // page_size).long()
    block = block_table.gather(1, page.clamp(max=block_table.shape[1] - 1)[:, None])[:, 0].long()
    has_page = (page < block_table.shape[1]) & (block >= 0)
    active = slots.active & ~ended & has_page
    address = torch.where(active, block * page_size + position % page_size, -1)
    new = Slots(active, token, depth, position, address, slots.finished | ended)
    for name, tensor in vars(slots).items():
        tensor.copy_(getattr(new, name))


def _write(ring: OutputRing, leave: Tensor, choices: Tensor, depth: Tensor) -> None:
    """Append an entry for each slot that ``leave [S]`` selects."""
    slot = leave.nonzero()[:, 0]
    at = (ring.counts[0] + torch.arange(len(slot), device=slot.device)) % len(ring.entries)
    columns = (slot, choices[slot], depth[slot], ring.counts[1].expand(len(slot)))
    ring.entries[at] = torch.stack([column.to(torch.int32) for column in columns], dim=-1)
    ring.counts.add_(torch.stack([leave.sum(), torch.ones_like(ring.counts[1])]))
