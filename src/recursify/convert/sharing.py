"""Which dense layers are tied: the sharing schemes, folded over a model's depth.

The schemes themselves are arithmetic and live with the model (:class:`recursify.modeling.LayerLayout`); here they meet
what a user may type.
"""

from __future__ import annotations

from recursify.errors import PlanError
from recursify.modeling import LayerLayout, LayoutError


def fold_layers(
    num_layers: int,
    num_recursions: int,
    sharing: str | None = None,
    *,
    num_prelude_layers: int | None = None,
    num_coda_layers: int | None = None,
) -> LayerLayout:
    """The layout for ``num_layers`` dense layers.

    Without a scheme, ``middle_cycle`` (one prelude and one coda layer) is taken, the best in MoR's tables 10 and 12;
    with an explicit prelude or coda, a plain ``cycle`` between them.

    Raises:
        PlanError: The depth does not divide (the nearest folds are listed), or the scheme is unknown.
    """
    explicit = num_prelude_layers is not None or num_coda_layers is not None
    if sharing is None:
        sharing = "cycle" if explicit or num_recursions == 1 else "middle_cycle"
    if explicit and sharing.startswith("middle_"):
        raise PlanError(
            f"--sharing {sharing} already means one prelude and one coda layer. Use --sharing "
            f"{sharing.removeprefix('middle_')} with --prelude and --coda, or leave those out."
        )
    try:
        return LayerLayout.fold(
            num_layers,
            num_recursions,
            sharing,
            num_prelude_layers=num_prelude_layers,
            num_coda_layers=num_coda_layers,
        )
    except LayoutError as error:
        raise PlanError(str(error)) from error
