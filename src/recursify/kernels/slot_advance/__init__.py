"""State machine of depth-wise batching on the device: it moves each slot to its next iteration.

A slot goes one recursion deeper, or its token exits and the slot starts the next token. The host can therefore replay
several iterations and then read the tokens from a ring. In Triton this is one launch without a sync.

Shape legend: S slots, M pages per slot, E EOS ids, C entries of the ring.
"""

from __future__ import annotations

from torch import Tensor

from recursify.kernels.dispatch import Implementation, load_implementation

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
    """Advance ``slots`` and ``ring`` by one iteration, in place.

    - An active slot that waits does not change.
    - A slot whose token does not exit goes one recursion deeper.
    - A slot whose token exits, by ``leaves`` or after the last recursion, appends an entry to the ring, in slot order,
      and starts its next token at depth 0 and the next position. It is finished and inactive if that token is in
      ``ends`` or its position has reached ``limits``.
    - A slot without a page for its next position becomes inactive without being finished. It can continue when the
      host has provided a page.

    Args:
        slots: State of the slots; written in place.
        leaves: Bool ``[S]``: result of the exit decision.
        choices: Integers ``[S]``: sampled token, for slots whose token exits.
        waits: Bool ``[S]``: slots that skip this iteration; None for none.
        limits: Integers ``[S]``: position of the slot's last token.
        ends: Integers ``[E]``: EOS ids; may be empty.
        block_table: Integers ``[S, M]``: page ids; negative for no page.
        page_size: Tokens per page.
        num_depths: Number of recursions.
        ring: Ring that tokens are appended to; ``C`` is at least ``S``.
        implementation: Name of the implementation, see :mod:`recursify.kernels.dispatch`.

    Raises:
        ValueError: Shapes do not fit one another, more than 4096 slots, or fewer ring entries than slots.
        RuntimeError: Triton is requested and cannot run on this device.
    """
    count = len(slots.active)
    per_slot = {"leaves": leaves, "choices": choices, "waits": waits, "limits": limits, "block_table": block_table}
    for name, values in per_slot.items():
        if values is not None and len(values) != count:
            raise ValueError(f"{name} must have an entry for each of {count} slots, got {len(values)}.")
    if count > MOST_SLOTS:
        raise ValueError(f"There can be at most {MOST_SLOTS} slots, which one program handles; got {count}.")
    if len(ring.entries) < count:
        raise ValueError(
            f"The ring has {len(ring.entries)} entries, too few for {count} slots. Make it at least that large."
        )
    module = load_implementation(__name__, slots.active.device, implementation)
    module.advance(slots, leaves, choices, waits, limits, ends, block_table, page_size, num_depths, ring)
