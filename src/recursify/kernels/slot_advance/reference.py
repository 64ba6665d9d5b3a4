"""What every slot does next, in plain PyTorch.

Shape legend: S slots, M pages of a slot, E tokens that end a text, C entries of the ring.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Slots:
    """What the slots of a batch are doing, on the device; the tensors stay, their contents change.

    Attributes:
        active: Bool ``[S]``: takes part in the next iteration.
        token: Integers ``[S]``: what goes in.
        depth: Integers ``[S]``: the recursion it is in.
        position: Integers ``[S]``: of the token in its sequence.
        address: Integers ``[S]``: of the token's keys, ``page id · page_size + place``, before the offset of a depth;
            -1 where the slot is not active.
        finished: Bool ``[S]``: said its last token.
    """

    active: Tensor
    token: Tensor
    depth: Tensor
    position: Tensor
    address: Tensor
    finished: Tensor

    @classmethod
    def empty(cls, count: int, device: torch.device | str | None = None) -> Slots:
        """``count`` slots, none of them active."""
        flags = (torch.zeros(count, dtype=torch.bool, device=device) for _ in range(2))
        token, depth, position = (torch.zeros(count, dtype=torch.int32, device=device) for _ in range(3))
        address = torch.full((count,), -1, dtype=torch.int64, device=device)
        return cls(next(flags), token, depth, position, address, next(flags))


@dataclass(frozen=True)
class OutputRing:
    """Tokens in the order in which they left, for a host that looks now and then.

    Attributes:
        entries: Int32 ``[C, 4]``: slot, token, depth it left after, iteration. Entry ``n`` is at ``n % C``.
        counts: Int64 ``[2]``: entries and iterations so far. A host that has read ``n`` finds the others at ``n % C``
            and on, as long as there are no more than ``C``.
    """

    entries: Tensor
    counts: Tensor

    @classmethod
    def empty(cls, capacity: int, device: torch.device | str | None = None) -> OutputRing:
        """With room for ``capacity`` tokens."""
        entries = torch.zeros(capacity, 4, dtype=torch.int32, device=device)
        return cls(entries, torch.zeros(2, dtype=torch.int64, device=device))


def advance(
    slots: Slots,
    leaves: Tensor,
    choices: Tensor,
    waits: Tensor | None,
    limits: Tensor,
    ends: Tensor,
    block_table: Tensor,
    page_size: int,
    num_depths: int,
    ring: OutputRing,
) -> None:
    """As :func:`recursify.kernels.slot_advance.advance_slots` says."""
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
    there = (page < block_table.shape[1]) & (block >= 0)
    active = slots.active & ~ended & there
    address = torch.where(active, block * page_size + position % page_size, -1)
    new = Slots(active, token, depth, position, address, slots.finished | ended)
    for name, held in vars(slots).items():
        held.copy_(getattr(new, name))


def _write(ring: OutputRing, leave: Tensor, choices: Tensor, depth: Tensor) -> None:
    slot = leave.nonzero()[:, 0]
    at = (ring.counts[0] + torch.arange(len(slot), device=slot.device)) % len(ring.entries)
    columns = (slot, choices[slot], depth[slot], ring.counts[1].expand(len(slot)))
    ring.entries[at] = torch.stack([column.to(torch.int32) for column in columns], dim=-1)
    ring.counts.add_(torch.stack([leave.sum(), torch.ones_like(ring.counts[1])]))
