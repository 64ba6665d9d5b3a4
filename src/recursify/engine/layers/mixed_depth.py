"""Layers of the shared block for rows at different depths.

The shared weight is one matrix product for all rows. The low-rank residuals are products per depth: for few rows, a
masked product with the factors of all depths at once (it reads the same bytes, since rows of all depths are present);
for many rows, ``grouped_mm``. Norms and biases are applied to the rows of their depth.

In the device loop shapes are static, and the host does not know the depths of the rows, which are a tensor. There
residuals are the masked product, biases are looked up, and norms are a kernel, or a selection from those of all depths.

Rows are the first axis of everything that a layer computes, so norms of heads select rows as norms of states do.

Shape legend: N rows, sorted by depth; I/O in/out features; R depths; r LoRA rank.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recursify.errors import UnsupportedModelError
from recursify.kernels.depth_norm import add_and_norm
from recursify.modeling import PerDepth, RelaxedLinear, SharedLayer
from recursify.modeling.recursive_layers import put

MASKED_ROWS = 64
"""Maximum number of rows for the masked product on a GPU: its shapes are static, and reading the factors costs more
than multiplying them."""

INDICES = {"depth", "layer_idx"}
"""Attributes that always differ between the depths of a layer."""

HANDLED = {"layer_type", "attention_type", "is_sliding", "sliding_window", "use_rope"}
"""Attributes that may differ between the depths of a layer: the engine provides masks and rotations by row."""


class DepthContext:
    """Depths of the rows in the current call, which mixed-depth layers share. It is set before each call.

    Attributes:
        depths: Depths ``[N]`` of the rows in any order, in static shapes; None if the host knows the depths.
        counts, slices: Depths of the rows in order, with the number of rows at each, and with their slice.
        num_rows: Number of rows.
    """

    def __init__(self) -> None:
        self.set([(0, 0)], torch.device("cpu"))

    def set(self, counts: list[tuple[int, int]], device: torch.device) -> None:
        """Set the depths of the rows in order, with the number of rows at each."""
        self.depths: Tensor | None = None
        self.counts = counts
        ends = list(accumulate(count for _, count in counts))
        self.slices = [(depth, slice(end - count, end)) for (depth, count), end in zip(counts, ends, strict=True)]
        self.num_rows, self.device = ends[-1], device
        self._groups: dict[int, tuple[Tensor, Tensor]] = {}

    def set_static(self, depths: Tensor) -> None:
        """Set the depth ``[N]`` of every row."""
        self.depths = depths
        self._masks: dict[int, Tensor] = {}

    def mask(self, num_depths: int) -> Tensor:
        """One-hot depth of every row, bool ``[N, R]``."""
        if self.depths is None:
            return self.by_group(num_depths)[1]
        if num_depths not in self._masks:
            self._masks[num_depths] = self.depths[:, None] == torch.arange(num_depths, device=self.depths.device)
        return self._masks[num_depths]

    @property
    def only_depth(self) -> int | None:
        """Depth of all rows, if the host knows that it is the same for all."""
        if self.depths is not None:
            return None
        return self.counts[0][0] if len(self.counts) == 1 else None

    def by_group(self, num_depths: int) -> tuple[Tensor, Tensor]:
        """End of each depth's rows, int32 ``[R]``, and one-hot depths ``[N, R]``."""
        if num_depths not in self._groups:
            counts = [0] * num_depths
            for depth, count in self.counts:
                counts[depth] = count
            ends = torch.tensor(counts).cumsum(0)
            depths = torch.repeat_interleave(torch.arange(num_depths), torch.tensor(counts))
            mask = F.one_hot(depths, num_depths).bool()
            self._groups[num_depths] = ends.to(self.device, torch.int32), mask.to(self.device)
        return self._groups[num_depths]


class MixedDepthLinear(nn.Module):
    """:class:`~recursify.modeling.RelaxedLinear` with a depth per row."""

    stored: Any

    def __init__(self, stored: RelaxedLinear, depth_context: DepthContext) -> None:
        super().__init__()
        object.__setattr__(self, "stored", stored)  # the model owns it
        self.depth_context = depth_context

    def forward(self, x: Tensor) -> Tensor:
        """Apply the linear map of each row's depth, ``[N, ..., I] -> [N, ..., O]``."""
        stored, depth = self.stored, self.depth_context.only_depth
        if depth is not None:
            return stored(x, depth)
        y = stored.linear(x)
        if stored.lora_a is not None:
            y = y + self._residuals(x.flatten(0, -2)).unflatten(0, x.shape[:-1])
        return y if stored.bias is None else self._add_bias(y, stored.bias)

    def _add_bias(self, y: Tensor, bias: Tensor) -> Tensor:
        if len(bias) == 1:
            return y + bias[0]
        if self.depth_context.depths is not None:
            return y + bias[self.depth_context.depths].view(len(y), *(1,) * (y.ndim - 2), -1)
        for depth, rows in self.depth_context.slices:
            y[rows] += bias[depth]
        return y

    def _residuals(self, x: Tensor) -> Tensor:
        """Low-rank residuals, ``[N, I] -> [N, O]``."""
        is_fixed = self.depth_context.depths is not None or (x.is_cuda and len(x) <= MASKED_ROWS)
        return self.masked(x) if is_fixed or not self._can_group(x) else self.grouped(x)

    def _can_group(self, x: Tensor) -> bool:
        """True if ``grouped_mm`` supports the shapes: rows of a multiple of 16 bytes, no float64."""
        sizes = (x.shape[-1], self.stored.lora_a.shape[1], self.stored.lora_b.shape[1])
        return x.dtype != torch.float64 and all(size * x.element_size() % 16 == 0 for size in sizes)

    def masked(self, x: Tensor) -> Tensor:
        """Residuals ``[N, O]`` as products with the factors of all depths, in static shapes."""
        lora_a, lora_b = self.stored.lora_a, self.stored.lora_b
        mask = self.depth_context.mask(len(lora_a))
        inner = F.linear(x, lora_a.flatten(0, 1)).unflatten(-1, lora_a.shape[:2]) * mask.unsqueeze(-1)
        y = F.linear(inner[:, 0], lora_b[0])
        for depth in range(1, len(lora_b)):
            y = torch.addmm(y, inner[:, depth], lora_b[depth].T)
        return y

    def grouped(self, x: Tensor) -> Tensor:
        """Residuals ``[N, O]`` as one product per depth with rows."""
        lora_a, lora_b = self.stored.lora_a, self.stored.lora_b
        ends, _ = self.depth_context.by_group(len(lora_a))
        inner = F.grouped_mm(x, lora_a.transpose(1, 2), offs=ends)
        return F.grouped_mm(inner, lora_b.transpose(1, 2), offs=ends)


class MixedDepthNorm(nn.Module):
    """:class:`~recursify.modeling.PerDepth` with a depth per row.

    Attributes:
        kernel_adds: Constant that the kernel for static shapes adds to the weights; None runs without the kernel.
    """

    stored: Any

    def __init__(self, stored: PerDepth, depth_context: DepthContext) -> None:
        super().__init__()
        object.__setattr__(self, "stored", stored)
        self.depth_context = depth_context
        self.kernel_adds: int | None = None
        self._weight: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Apply the norm of each row's depth, ``[N, ...] -> [N, ...]``."""
        depth, copies = self.depth_context.only_depth, self.stored.copies
        if depth is not None or len(copies) == 1:
            return self.stored(x, depth or 0)
        if self.depth_context.depths is None:
            return torch.cat([self.stored(x[rows], depth) for depth, rows in self.depth_context.slices])
        if self.kernel_adds is not None:
            return self._by_kernel(x, self.depth_context.depths, bool(self.kernel_adds))
        y = copies[0](x)
        for depth in range(1, len(copies)):
            is_here = (self.depth_context.depths == depth).view(-1, *(1,) * (x.ndim - 1))
            y = torch.where(is_here, copies[depth](x), y)
        return y

    def _by_kernel(self, x: Tensor, depths: Tensor, adds_one: bool) -> Tensor:
        rows = x.flatten(0, -2)
        depths = depths.repeat_interleave(len(rows) // len(x), output_size=len(rows))
        norm = self.stored.copies[0]
        if self._weight is None:
            self._weight = torch.stack([stored.weight for stored in self.stored.copies])
        eps = getattr(norm, "variance_epsilon", None) or norm.eps
        _, normed = add_and_norm(rows, None, self._weight, depths, eps=eps, adds_one=adds_one, implementation="triton")
        return normed.view_as(x)


def use_norm_kernel(layers: Iterable[nn.Module]) -> None:
    """Use the kernel for those norms of mixed-depth ``layers`` that it can compute."""
    for layer in layers:
        for module in layer.modules():
            if isinstance(module, MixedDepthNorm):
                module.kernel_adds = rms_norm_adds(module.stored.copies[0])


@torch.no_grad()
def rms_norm_adds(norm: nn.Module) -> int | None:
    """Constant ``c`` for which ``norm`` is ``x / √(mean(x²) + eps) · (c + weight)``: 0, or 1 in Gemma; None if neither.

    A copy of the norm is evaluated, because families have the same norm under many names.
    """
    weight = getattr(norm, "weight", None)
    eps = getattr(norm, "variance_epsilon", None) or getattr(norm, "eps", None)
    if weight is None or weight.ndim != 1 or not isinstance(eps, float) or len(list(norm.parameters())) > 1:
        return None
    probe: Any = copy.deepcopy(norm).to_empty(device="cpu").float()
    x = torch.linspace(-2, 3, 2 * len(weight)).view(2, -1)
    probe.weight.copy_(torch.linspace(-1, 2, len(weight)))
    for adds in (0, 1):
        expected = F.rms_norm(x, x.shape[-1:], probe.weight + adds, eps)
        if torch.allclose(probe(x), expected, rtol=1e-4, atol=1e-5):
            return adds
    return None


def mixed_layer(
    shared: SharedLayer, depth_context: DepthContext, name: str, rotates: Callable[[int, nn.Module], bool]
) -> tuple[nn.Module, tuple[bool, ...]]:
    """Build the family's layer with a depth per row.

    Args:
        shared: Layer of the shared block.
        depth_context: Depths of the rows.
        name: Name of the layer for messages.
        rotates: Function from a depth and its layer to whether that rotates queries and keys.

    Returns:
        The layer, and for each depth whether it rotates queries and keys.

    Raises:
        UnsupportedModelError: The depths of the layer differ in more than weights, windows and rotations.
    """
    views = list(shared.views)
    are_alike = _check_alike(views, name)
    ropes = (True,) * len(views) if are_alike else tuple(rotates(depth, view) for depth, view in enumerate(views))
    # A layer that rotates, since depths without RoPE can get cosines of 1 and sines of 0.
    template = views[ropes.index(True)] if any(ropes) else views[0]
    # The copy shares the stored weights, and the config from which layers look up their attention function.
    memo: dict[int, Any] = {}
    for module in template.modules():
        if hasattr(module, "config"):
            memo[id(module.config)] = module.config
    layer = copy.deepcopy(template, memo)
    for path, stored in shared.stored_modules():
        if not isinstance(stored, RelaxedLinear | PerDepth):
            raise UnsupportedModelError(
                f"'{path}' of {name} is a {type(stored).__name__}, which another tool put there, and the engine cannot "
                f"run at several depths. Merge the adapter first: model.merge_and_unload()."
            )
        mixed: Any = MixedDepthLinear if isinstance(stored, RelaxedLinear) else MixedDepthNorm
        put(layer, path, mixed(stored, depth_context))
    return layer, ropes


def _check_alike(views: list[nn.Module], name: str) -> bool:
    """True if depths differ in nothing but weights; an UnsupportedModelError if in what the engine does not handle."""
    are_alike = True
    plain = (bool, int, float, str, type(None))
    for path, module in views[0].named_modules():
        for other in views[1:]:
            counterpart = vars(other.get_submodule(path))
            for key, value in vars(module).items():
                if key in INDICES or not isinstance(value, plain) or counterpart.get(key) == value:
                    continue
                are_alike = False
                if key not in HANDLED:
                    raise UnsupportedModelError(
                        f"The engine runs rows of all depths in one call, but {name} differs between depths: "
                        f"'{path}.{key}' is {value} and {counterpart.get(key)}. Export the model instead: recursify "
                        f"export --format dense."
                    )
    return are_alike
