"""Estimated time, memory and disk of a conversion: operations counted from a plan's shapes, and timed matrix products.

Counted are the passes of the calibration (docs/calibration.md), the singular value decompositions of a conversion
without text, and the check. Not counted are tokenizing, reading and writing, and the experiments: rank allocations and
Fisher information.

Shapes: O/I output/input features of a linear map, n tokens, T tokens per window, D hidden size, r rank, R recursions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby

import torch
import torch.nn.functional as F

from recursify.checkpoint.layerwise import TOKENS_PER_BATCH
from recursify.evaluation.perplexity import LOGIT_BYTES

from .calibration import SHARE_TOKENS
from .low_rank import EXACT_SVD_LIMIT, OVERSAMPLING, is_small_rank
from .pipeline import CHECK_LENGTH, CHECK_WINDOWS
from .plan import ConversionPlan
from .relaxation import find_relaxation
from .weighted_norm import BLOCK

PRODUCTS = 5
"""Products of a subspace iteration; 4 to 6 on SmolLM2's residuals."""

CHOLESKY, SOLVE, EIGEN, SVD, QR = 2 / 3, 3.0, 12.0, 30.0, 8.0
"""Operations of a Cholesky factor (per I³), of solving with it (per I² and row), of all eigenvectors (per N³), of a
singular value decomposition (per longer side and squared shorter side) and of QR (per row and squared column), in units
of a matrix product's: measured in LAPACK on one thread, 576 to 2,048 wide."""

LOGIT = 1000.0
"""Operations per logit of a comparison, which takes the time of reading and writing it several times."""

ELEMENT = 250.0
"""Operations per output of a layer's linear maps, for activations, norms and copies: the time that passes of SmolLM2's
layers over 16,384 tokens take beyond their products."""

PROCESS_BYTES = 650_000_000
"""Memory of a process that has imported torch and transformers."""

SPEED_TOKENS = 256
SPEED_WIDTH = {"cpu": 1024, "cuda": 4096}
"""Size of the timed products by kind of device: large enough for full speed, small enough for milliseconds."""


@dataclass(frozen=True, kw_only=True)
class CostEstimate:
    """Estimated cost of a conversion on this machine.

    Attributes:
        device: Device of the calibration.
        seconds: Time with as many threads as torch uses now.
        peak_bytes: Largest memory of the process; on a GPU, of the device.
        disk_bytes: Bytes of the written weights.
    """

    device: str
    seconds: float
    peak_bytes: int
    disk_bytes: int

    def __str__(self) -> str:
        return (
            f"about {_duration(self.seconds)}, {self.peak_bytes / 1e9:,.1f} GB of memory, "
            f"{self.disk_bytes / 1e9:,.1f} GB on disk"
        )


@dataclass(frozen=True)
class Work:
    """Floating-point operations of products in float32 and in float64."""

    float32: float = 0.0
    float64: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.float32 + other.float32, self.float64 + other.float64)

    def __mul__(self, times: float) -> Work:
        return Work(times * self.float32, times * self.float64)


@dataclass(frozen=True)
class MapShape:
    """Shape ``[O, I]`` of a linear map and the rank of its residuals."""

    outputs: int
    inputs: int
    rank: int

    @property
    def size(self) -> int:
        return self.outputs * self.inputs


@dataclass(frozen=True)
class LayerShape:
    """Linear maps of a layer by stage, which shares its inputs, and the width of its attention (heads × head size)."""

    stages: list[list[MapShape]]
    attention: int

    @property
    def maps(self) -> list[MapShape]:
        return [shape for stage in self.stages for shape in stage]

    @property
    def size(self) -> int:
        return sum(shape.size for shape in self.maps)

    @property
    def input_widths(self) -> list[int]:
        return [stage[0].inputs for stage in self.stages]

    def run(self, tokens: int, length: int) -> Work:
        """One pass over ``tokens`` in windows of ``length``."""
        products = 2.0 * (self.size + 2 * length * self.attention)
        return Work(tokens * (products + ELEMENT * sum(shape.outputs for shape in self.maps)))


Speed = Callable[[torch.dtype, str], float]
"""Function from a dtype and a device to floating-point operations per second."""


def measure_speed(dtype: torch.dtype, device: str) -> float:
    """Floating-point operations per second of matrix products in ``dtype``, the best of three."""
    width = SPEED_WIDTH.get(torch.device(device).type, SPEED_WIDTH["cpu"])
    inputs = torch.ones(SPEED_TOKENS, width, dtype=dtype, device=device)
    weight = torch.ones(width, width, dtype=dtype, device=device)
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        float(F.linear(inputs, weight)[0, 0])  # waits for the device
        seconds.append(time.perf_counter() - start)
    return 2 * SPEED_TOKENS * width * width / min(seconds[1:])


def estimate_costs(
    plan: ConversionPlan, *, devices: Sequence[str] | None = None, check: bool = True, speed: Speed | None = None
) -> list[CostEstimate]:
    """Estimate the cost of carrying out a plan, by device of its calibration.

    Args:
        plan: Plan of a conversion.
        devices: Devices to calibrate on. Without them, the CPU, and the GPU if there is one.
        check: Flag to count the check after the conversion, which runs on the CPU.
        speed: Speeds of matrix products; without it they are measured, in a fraction of a second.
    """
    if devices is None:
        devices = ["cpu", "cuda"] if torch.cuda.is_available() and plan.needs_text else ["cpu"]
    speed = cache(measure_speed) if speed is None else speed
    return [estimate_cost(plan, device, check=check, speed=speed) for device in devices]


def estimate_cost(plan: ConversionPlan, device: str, *, check: bool, speed: Speed) -> CostEstimate:
    """Estimated cost of a plan on one device; arguments are those of :func:`estimate_costs`."""
    layers = list(layer_shapes(plan))
    if plan.needs_text:
        work = share_work(plan, layers) + drift_work(plan, layers)
        peak = max(_share_bytes(plan, layers), _drift_bytes(plan, layers))
    else:
        work, peak = svd_work(plan, layers), 24 * max(shape.size for layer in layers for shape in layer.maps)
    peak = max(peak, 8 * plan.config.vocab_size * plan.config.hidden_size)  # the embedding, as it is copied
    seconds = work.float32 / speed(torch.float32, device) + work.float64 / speed(torch.float64, device)
    on_host = torch.device(device).type == "cpu"
    if check:
        dtype = torch.float32 if plan.config.dtype == torch.float16 else plan.config.dtype
        seconds += check_work(plan, layers) / speed(dtype, "cpu")
        peak = max(peak, _check_bytes(plan)) if on_host else peak
    return CostEstimate(
        device=device,
        seconds=seconds,
        peak_bytes=peak + (PROCESS_BYTES if on_host else 0),
        disk_bytes=plan.recursive.num_bytes,
    )


def layer_shapes(plan: ConversionPlan) -> Iterator[LayerShape]:
    """Shapes of the block layers.

    The maps of a stage are those of one submodule with inputs of one width; the last map of a submodule (o, down) has
    inputs of its own.
    """
    config = plan.config
    heads = config.num_attention_heads
    weights = plan.tensors
    attention = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    for index in range(plan.layout.block_size):
        stages: list[list[MapShape]] = []
        modules = [module for module in plan.names.stored_modules(index) if module.is_linear]
        for _, group in groupby(modules, key=lambda module: module.path.rpartition(".")[0]):
            shapes = []
            for module in group:
                outputs, inputs = weights[module.shared_weight].shape
                shapes.append(MapShape(outputs, inputs, module.rank))
            first = [list(alike) for _, alike in groupby(shapes[:-1], key=lambda shape: shape.inputs)]
            stages += [*first, shapes[-1:]]
        yield LayerShape(stages, attention)


def _tokens(plan: ConversionPlan) -> tuple[int, int]:
    """Calibration tokens, and the length of a window."""
    length = min(plan.settings.calibration_length, plan.config.max_position_embeddings)
    return plan.settings.calibration_tokens, length


def _share_tokens(plan: ConversionPlan) -> int:
    tokens, _ = _tokens(plan)
    return min(tokens, SHARE_TOKENS) if plan.corrects_drift else tokens


def share_work(plan: ConversionPlan, layers: list[LayerShape]) -> Work:
    """Operations of the first pass: walk to the starts, each block layer with second moments, and shared weights."""
    layout, tokens, (_, length) = plan.layout, _share_tokens(plan), _tokens(plan)
    starts = layout.positions(0)
    work = layers[0].run(tokens, length) * (starts[0] if layout.order == "sequence" else starts[-1])
    fits = plan.settings.initialization == "calibrated"
    fits_residuals = fits and find_relaxation(plan.settings.relaxation).needs_text
    for layer in layers:
        work += layer.run(tokens, length) * layout.num_recursions
        for stage in layer.stages:
            work += moment_work(tokens, stage[0].inputs) * layout.num_recursions
            if fits:
                work += share_stage_work(stage, layout.num_recursions, fits_residuals=fits_residuals)
            if not plan.corrects_drift:
                for shape in stage:
                    work += low_rank_work(shape, shape.rank) * layout.num_recursions
    return work


def share_stage_work(stage: list[MapShape], recursions: int, *, fits_residuals: bool) -> Work:
    """Operations of the shared weights of a stage (:func:`~recursify.convert.sharing.share_for_residuals`)."""
    inputs = stage[0].inputs
    work = Work(float64=CHOLESKY * inputs**3)
    for shape in stage:
        work += Work(2.0 * recursions * shape.outputs * inputs**2, SOLVE * shape.outputs * inputs**2)
        if not fits_residuals or not shape.rank or recursions == 1:
            continue
        refit = Work(2.0 * inputs**2, SOLVE * inputs**2 + 2 * shape.size) * (recursions * shape.rank)
        if recursions == 2:
            work += low_rank_work(shape, 2 * shape.rank) + refit
            work += Work(2.0 * shape.outputs * inputs**2, SOLVE * shape.outputs * inputs**2)
        else:
            work += (low_rank_work(shape, shape.rank) + refit) * (4 * recursions)
    return work


def drift_work(plan: ConversionPlan, layers: list[LayerShape]) -> Work:
    """Operations of the second pass: the prelude, and each block position dense and converted, with refitted stages."""
    if not plan.corrects_drift:
        return Work()
    tokens, length = _tokens(plan)
    work = layers[0].run(tokens, length) * plan.layout.num_prelude_layers
    for layer in layers:
        position = layer.run(tokens, length) * 2
        for stage in layer.stages:
            position += refit_work(stage, tokens)
        work += position * plan.layout.num_recursions
    return work


def refit_work(stage: list[MapShape], tokens: int) -> Work:
    """Operations of the residuals of a stage at one position: norm, regression, and factors."""
    fitted = [shape for shape in stage if shape.rank]
    if not fitted:
        return Work()
    inputs, in_tokens = stage[0].inputs, tokens < stage[0].inputs
    targets = inputs if len(fitted) > 1 else fitted[0].outputs
    # The errors of one map are computed from its weight; several maps share the regression of their inputs.
    work = Work(2.0 * inputs * (tokens * targets if len(fitted) == 1 else sum(s.size for s in fitted)))
    if in_tokens:
        work += moment_work(inputs, tokens) + Work(2.0 * targets * tokens * inputs)
        work += Work(float64=CHOLESKY * tokens**3 + SOLVE * targets * tokens**2)
    else:
        work += moment_work(tokens, inputs) + Work(2.0 * targets * tokens * inputs)
        work += Work(float64=CHOLESKY * inputs**3 + SOLVE * targets * inputs**2)
    for shape in fitted:
        work += low_rank_work(shape, shape.rank, tokens if in_tokens else None)
    return work


def moment_work(tokens: int, width: int) -> Work:
    """Operations of ``Σ x xᵀ [I, I]``: its blocks on and above the diagonal."""
    return Work(float(tokens) * width * (width + min(width, BLOCK)))


def low_rank_work(shape: MapShape, rank: int, tokens: int | None = None) -> Work:
    """Operations of the factors of a residual, in a norm given by a second moment or by ``tokens`` inputs."""
    outputs, inputs = shape.outputs, shape.inputs
    smaller = min(outputs, inputs)
    if rank == 0 or rank >= smaller:
        return Work()
    if not is_small_rank(torch.empty(outputs, inputs, device="meta"), rank):
        return Work(2.0 * outputs * inputs**2, 2.0 * smaller * shape.size + EIGEN * smaller**3)
    columns = min(rank + OVERSAMPLING, smaller)
    product = 4.0 * shape.size * tokens if tokens else 2.0 * outputs * inputs**2
    has_gram = outputs <= inputs
    gram = 2.0 * outputs * shape.size if has_gram else 0.0
    step = 2.0 * columns * (outputs**2 if has_gram else 2 * shape.size) + (QR + 2) * outputs * columns**2
    return Work(product + gram + PRODUCTS * step + 2.0 * rank * shape.size)


def svd_work(plan: ConversionPlan, layers: list[LayerShape]) -> Work:
    """Operations of the residuals of a conversion without text: one truncated decomposition per map and depth."""
    work = Work()
    if not plan.has_residuals or plan.settings.relaxation != "svd":
        return work
    for shape in (shape for layer in layers for shape in layer.maps):
        smaller, larger = sorted((shape.outputs, shape.inputs))
        if shape.rank in (0, smaller) or shape.rank > smaller:
            continue
        is_exact = smaller <= EXACT_SVD_LIMIT or shape.rank >= smaller // 8
        operations = SVD * larger * smaller**2 if is_exact else 28.0 * shape.size * (shape.rank + 16)
        work += Work(operations) * plan.layout.num_recursions
    return work


def check_work(plan: ConversionPlan, layers: list[LayerShape]) -> float:
    """Operations of the check: the windows of the held-out text in both models, with logits."""
    length = min(CHECK_LENGTH, plan.config.max_position_embeddings)
    tokens = CHECK_WINDOWS * length
    body = layers[0].run(tokens, length).float32 * plan.layout.num_layers
    residuals = sum(s.rank * (s.outputs + s.inputs) for layer in layers for s in layer.maps)
    head = tokens * plan.config.vocab_size * (2.0 * plan.config.hidden_size + LOGIT)
    return 2 * (body + head) + 2.0 * tokens * residuals * plan.layout.num_recursions


def _share_bytes(plan: ConversionPlan, layers: list[LayerShape]) -> int:
    """Hidden states at the cursors, the layers of a tied group, their moments, and a batch or a solve."""
    tokens, hidden, recursions = _share_tokens(plan), plan.config.hidden_size, plan.layout.num_recursions
    layer = max(layers, key=lambda layer: layer.size)
    kept = (recursions + 1) * tokens * hidden + recursions * (layer.size + sum(i * i for i in layer.input_widths))
    batch = 4 * min(tokens, TOKENS_PER_BATCH) * (2 * hidden + sum(layer.input_widths) + 3 * max(layer.input_widths))
    solve = max(24 * shape.inputs**2 + 40 * shape.size for shape in layer.maps)
    return 4 * kept + max(batch, solve)


def _drift_bytes(plan: ConversionPlan, layers: list[LayerShape]) -> int:
    """Hidden states of both models, two layers, the dense inputs of all stages, the MLP's activations, and a solve."""
    if not plan.corrects_drift:
        return 0
    (tokens, _), hidden = _tokens(plan), plan.config.hidden_size
    layer = max(layers, key=lambda layer: layer.size)
    widths = layer.input_widths
    kept = tokens * (5 * hidden + sum(widths) + 4 * max(widths)) + 2 * layer.size
    solve = max(28 * min(shape.inputs, tokens) ** 2 + 24 * shape.size for shape in layer.maps)
    return 4 * kept + solve


def _check_bytes(plan: ConversionPlan) -> int:
    """The larger of the dense model and of the recursive model with the dense head and logits."""
    head = plan.config.vocab_size * plan.config.hidden_size * plan.config.dtype.itemsize
    return max(plan.dense.num_bytes, plan.recursive.num_bytes + head + 6 * LOGIT_BYTES)


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    if seconds < 600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
