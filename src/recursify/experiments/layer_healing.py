"""Stage ``layers``: fit every shared layer to the outputs of the dense layers that it replaces, one after the other."""

from __future__ import annotations

from functools import partial

from recursify.checkpoint.dense_checkpoint import DenseCheckpoint
from recursify.checkpoint.dense_names import DenseNames
from recursify.checkpoint.recursive_checkpoint import RecursiveCheckpoint
from recursify.checkpoint.writer import ShardedCheckpoint
from recursify.errors import CheckpointError, SettingsError, TrainingError
from recursify.uptrain.callbacks import METRICS_FILE, append_metrics, draw_curves
from recursify.uptrain.data import padding_token, prepare_data
from recursify.uptrain.saving import check_saving
from recursify.uptrain.settings import UptrainSettings
from recursify.uptrain.stage import Stage, TrainingRun, UptrainResult

from .layer_fitting import LayerFitter


class LayerHealing(Stage):
    """Healing without the Trainer: neither the dense nor the recursive model is ever in memory as a whole."""

    needs_teacher = True

    @classmethod
    def check_settings(cls, settings: UptrainSettings) -> None:
        """Check that no setting of the Trainer is used."""
        unused = {
            "random_recursions": settings.random_recursions,
            "sharding": settings.sharding != "none",
            "precision": settings.precision == "bfloat16",
            "gradient_checkpointing": settings.gradient_checkpointing,
            "report_to": settings.report_to,
        }
        if names := [name for name, is_used in unused.items() if is_used]:
            raise SettingsError(
                f"{', '.join(names)}: not supported by stage '{settings.stage}' (one layer at a time, all depths at "
                f"once, in float32 and one process). Remove these settings."
            )

    @classmethod
    def train(cls, run: TrainingRun) -> UptrainResult:
        """Fit all shared layers in one process.

        Raises:
            TrainingError: The run is to be resumed, or there are several processes.
        """
        if run.resume:
            raise TrainingError(
                f"Stage '{run.settings.stage}' is short and writes no checkpoints. Run it again with --overwrite."
            )
        if run.state.num_processes > 1:
            raise TrainingError(
                f"Stage '{run.settings.stage}' runs in one process, but {run.state.num_processes} were started. Omit "
                f"--num-processes."
            )
        run.check_output()
        student, tokenizer = RecursiveCheckpoint(run.source), run.load_tokenizer()
        teacher = run.open_teacher(needed=True)
        require_same_layers(teacher, student.names)
        data = prepare_data(run.settings, tokenizer, run.config.vocab_size)
        check_saving(run.source, run.config, tokenizer)
        run.begin()
        run.scratch.mkdir()
        weights = ShardedCheckpoint(run.scratch, student.tensors)
        for name in student.tensors:
            weights.write(name, student.read(name))
        log = partial(append_metrics, run.output / METRICS_FILE)
        pad = padding_token(tokenizer, run.config.vocab_size)
        fitter = LayerFitter(run, teacher, weights, data, pad=pad, log=log)
        before = fitter.measure()
        log({"step": 0, "tokens": 0, **{f"eval_{name}": value for name, value in before.items()}})
        fitter.fit()
        after = fitter.measure()
        log({"step": fitter.steps, "tokens": fitter.tokens, **{f"eval_{name}": value for name, value in after.items()}})
        result = UptrainResult(run.output, fitter.steps, fitter.tokens, before, after, draw_curves(run.output))
        run.publish(run.config, tokenizer, result, data.name)
        return result


def require_same_layers(teacher: DenseCheckpoint, names: DenseNames) -> None:
    """Check that the dense model has the layers that the recursive one was made from.

    Raises:
        CheckpointError: A parameter is missing or has another shape; the message names it.
    """
    for name, shape in names.dense_parameters.items():
        parameter = teacher.parameters.get(name)
        if parameter is None or parameter.shape != shape:
            actual = "does not have it" if parameter is None else f"has {list(parameter.shape)}"
            raise CheckpointError(
                f"The layers of the teacher '{teacher.source}' do not match this model: '{name}' must be "
                f"{list(shape)}, but the teacher {actual}. Give the dense model that the recursive one was made from."
            )
