"""The state machine of depth-wise batching, on the device: what each slot does in the next iteration.

A slot goes one recursion deeper, or its token leaves and it starts on the next one. With this the host need not look at
every iteration: it replays some, and reads the tokens that have left from a ring. In Triton it is one launch, and it
does not wait for the device.

Shape legend: S slots, M pages of a slot, E tokens that end a text, C entries of the ring.
"""

from __future__ import annotations

from torch import Tensor

from recursify.kernels.dispatch import Implementation, uses_triton

from . import reference
from .reference import OutputRing, Slots

__all__ = ["OutputRing", "Slots", "advance_slots"]

MOST_SLOTS = 4096


def advance_slots(
    slots: Slots,
    leaves: Tensor,
    choices: Tensor,
    *,
    waits: Tensor | None = None,
    limits: Tensor,
    ends: Tensor,
    block_table: Tensor,
    page_size: int,
    num_depths: int,
    ring: OutputRing,
    implementation: Implementation = "auto",
) -> None:
    """Bring ``slots`` and ``ring`` to the next iteration, in place.

    An active slot that waits stays as it is, wherever it is. One whose token does not leave is one recursion deeper,
    all else as it was. One whose token leaves, because ``leaves`` says so or because it was in the last recursion, has
    an entry in the ring, in the order of slots, and starts at depth 0 with its choice, one position on. It is finished,
    and not active, if the choice is one of ``ends`` or its position is at ``limits``. A slot whose next position has no
    page pauses: it is not active, and not finished either; it may go on when the host has given it a page.

    Args:
        slots: As they were in this iteration; written to.
        leaves: Bool ``[S]``: what the exit test said.
        choices: Integers ``[S]``: the token that was drawn, where one leaves.
        waits: Bool ``[S]``: slots that have no part in this iteration; None for none.
        limits: Integers ``[S]``: the position that a slot's last token will have.
        ends: Integers ``[E]``: tokens that end a text; may be none.
        block_table: Integers ``[S, M]``: page ids; negative where there is none.
        page_size: Tokens per page.
        num_depths: Recursions.
        ring: Written to. ``C`` is ``S`` at least.
        implementation: See :mod:`recursify.kernels.dispatch`.

    Raises:
        ValueError: Shapes that do not fit one another, more than 4096 slots, or a ring with fewer entries than slots.
        RuntimeError: Triton is asked for, and cannot run on this device.
    """
    count = len(slots.active)
    per_slot = {"leaves": leaves, "choices": choices, "waits": waits, "limits": limits, "block_table": block_table}
    for name, values in per_slot.items():
        if values is not None and len(values) != count:
            raise ValueError(f"{name} must have an entry for each of {count} slots, got {len(values)}.")
    if count > MOST_SLOTS:
        raise ValueError(f"One program has all slots, {MOST_SLOTS} at most; got {count}.")
    if len(ring.entries) < count:
        raise ValueError(f"The ring has {len(ring.entries)} entries, and {count} slots may all have a token at once.")
    given = (slots, leaves, choices, waits, limits, ends, block_table, page_size, num_depths, ring)
    if uses_triton(implementation, slots.active.device):
        from . import triton

        triton.advance(*given)
    else:
        reference.advance(*given)
