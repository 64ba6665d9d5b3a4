"""Tensors of a dense folder, matched to the parameters of its family's model as transformers matches them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key

from recursify.errors import CheckpointError, UnsupportedModelError

from .shards import TensorInfo


@dataclass(frozen=True)
class MatchedTensors:
    """Tensors of a checkpoint by parameter.

    Attributes:
        stored_names: Name on disk of every parameter; of a tied one, under each of its names that is on disk.
        parameters: Shape and dtype of the same.
        tied: Names of parameters that the config ties to others, with those.
    """

    stored_names: dict[str, str]
    parameters: dict[str, TensorInfo]
    tied: dict[str, str]


def match_tensors(skeleton: PreTrainedModel, stored: dict[str, TensorInfo | str], folder: Path) -> MatchedTensors:
    """Match the tensors of ``folder`` to the parameters of a model on the meta device.

    Names on disk are renamed by transformers' own rules, so that older ones are found, too.

    Args:
        skeleton: Model of the family.
        stored: Tensors on disk; a name instead of a dtype that is not floating-point.
        folder: Folder of the model.

    Raises:
        CheckpointError: A tensor is missing, left over, quantized, or of a wrong shape.
        UnsupportedModelError: transformers would compute a parameter from several tensors.
    """
    expected = skeleton.state_dict()
    sources = _by_parameter(skeleton, stored, expected, folder)
    tied = {name: target for name, target in skeleton.all_tied_weights_keys.items() if name in expected}
    stored_names: dict[str, str] = {}
    infos: dict[str, TensorInfo] = {}
    for name, parameter in skeleton.named_parameters(remove_duplicate=False):
        stored_name = sources.get(name)
        if stored_name is None:
            if _is_given_by_tie(name, tied, sources):
                continue
            raise CheckpointError(
                f"'{folder}' lacks the tensor '{name}' of a {skeleton.config.model_type} model with "
                f"{skeleton.config.num_hidden_layers} layers. The folder is incomplete, or config.json belongs to "
                f"another model: fetch the model again."
            )
        stored_names[name], infos[name] = stored_name, _checked(stored_name, stored[stored_name], parameter)
    return MatchedTensors(stored_names, infos, tied)


def _is_given_by_tie(name: str, tied: dict[str, str], sources: dict[str, str]) -> bool:
    """Tell whether a parameter is tied to one on disk, in either direction."""
    return tied.get(name) in sources or any(target == name and other in sources for other, target in tied.items())


def _checked(stored_name: str, info: TensorInfo | str, parameter: nn.Parameter) -> TensorInfo:
    if isinstance(info, str):
        raise CheckpointError(
            f"'{stored_name}' is stored as {info}, which is not floating-point. Convert the unquantized checkpoint."
        )
    if info.shape != tuple(parameter.shape):
        raise CheckpointError(
            f"'{stored_name}' has shape {list(info.shape)}, but config.json requires {list(parameter.shape)}. The "
            f"weights and the config belong to different models: fetch the model again."
        )
    return info


def _by_parameter(
    skeleton: PreTrainedModel, stored: dict[str, TensorInfo | str], expected: dict[str, object], folder: Path
) -> dict[str, str]:
    """Name on disk by name of a parameter or buffer.

    Raises:
        CheckpointError: Tensors that the model does not have, and that transformers does not ignore.
        UnsupportedModelError: transformers would compute a parameter from several tensors.
    """
    mapping = get_model_conversion_mapping(skeleton)
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    renamings = [entry for entry in mapping if not isinstance(entry, WeightConverter)]
    sources: dict[str, str] = {}
    left_over: set[str] = set()
    for stored_name in stored:
        name, converted_by = rename_source_key(stored_name, renamings, converters, skeleton.base_model_prefix, expected)
        if stored_name in expected:  # as written by another version, whose names need no conversion
            name, converted_by = stored_name, None
        if converted_by is not None and name in expected:
            raise UnsupportedModelError(
                f"'{stored_name}' in '{folder}' is one of several tensors that transformers makes '{name}' of while "
                f"loading, which is not supported for '{skeleton.config.model_type}'."
            )
        if name in expected:
            sources[name] = stored_name
        else:
            left_over.add(stored_name)
    _refuse_left_over(skeleton, left_over, folder)
    return sources


def _refuse_left_over(skeleton: PreTrainedModel, names: set[str], folder: Path) -> None:
    """Refuse tensors that the model does not have, except those that transformers ignores without a warning."""
    info = SimpleNamespace(missing_keys=set(), unexpected_keys=names)
    skeleton._adjust_missing_and_unexpected_keys(info)
    if left_over := sorted(info.unexpected_keys):
        raise CheckpointError(
            f"'{folder}' has {len(left_over)} tensors that a {skeleton.config.model_type} model with this config.json "
            f"does not have: {', '.join(left_over[:3])}{', …' if len(left_over) > 3 else ''}. They would be dropped. "
            f"If config.json is wrong (a bias that it denies, layers that it does not count), correct it; if they are "
            f'not needed, drop them once: python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{folder}').save_pretrained('{folder}-clean')\""
        )
