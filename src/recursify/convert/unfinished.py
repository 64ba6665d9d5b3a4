"""Progress of a conversion on disk: a killed run goes on at its last finished layer (``--resume``)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from recursify.checkpoint.writer import UNFINISHED_FILE, ShardedCheckpoint
from recursify.errors import OutputError


class UnfinishedConversion:
    """Hidden states after the last finished layer, kept beside the weights that are written so far.

    A resumed run computes what follows from the same numbers, so it writes the same bytes as one that was not killed.

    Attributes:
        stage: Pass that was interrupted; empty in a new conversion.
        unwritten: Tensors that were not written yet; None in a new conversion.

    Args:
        folder: Scratch folder of the conversion.
        facts: JSON-ready facts that must not change between runs: source, settings, text, versions.
        generator: Random generator of the conversion; it is set to where the interrupted run was.

    Raises:
        OutputError: The folder's conversion was started with other facts.
    """

    def __init__(self, folder: Path, facts: dict[str, Any], generator: torch.Generator):
        self.file = folder / UNFINISHED_FILE
        self.facts = json.loads(json.dumps(facts))
        self.generator = generator
        self.stage = ""
        self.unwritten: set[str] | None = None
        self._done = 0
        self._states: list[Tensor] = []
        if self.file.exists():
            self._load()

    def _load(self) -> None:
        with safe_open(self.file, framework="pt") as file:
            saved = json.loads(file.metadata()["progress"])
            self._check(saved["facts"])
            # Copies, aligned as in the first run: the last bits of products depend on that.
            self._states = [file.get_tensor(f"state.{index}").clone() for index in range(saved["num_states"])]
            self.generator.set_state(file.get_tensor("generator"))
        self.stage, self._done, self.unwritten = saved["stage"], saved["done"], set(saved["unwritten"])

    def _check(self, before: dict[str, Any]) -> None:
        for name in sorted(before.keys() | self.facts.keys()):
            if before.get(name) != self.facts.get(name):
                raise OutputError(
                    f"Cannot resume: '{name}' was {before.get(name)!r} when this conversion started, and is "
                    f"{self.facts.get(name)!r} now. Use the old value, or start again without --resume."
                )

    def resume_at(self, stage: str) -> tuple[int, list[Tensor]] | None:
        """Number of layers done in the pass ``stage``, and hidden states after them; None at its start."""
        if stage != self.stage:
            return None
        states, self._states = self._states, []
        return self._done, states

    def save(self, stage: str, done: int, states: list[Tensor], output: ShardedCheckpoint) -> None:
        """Record that ``done`` layers of a pass are finished, ``states [N, T, D]`` the hidden states after them."""
        output.sync()
        tensors = {f"state.{index}": state.cpu().clone() for index, state in enumerate(states)}
        saved = {
            "facts": self.facts,
            "stage": stage,
            "done": done,
            "num_states": len(states),
            "unwritten": sorted(output.unwritten),
        }
        scratch = self.file.with_name(f".{self.file.name}")
        save_file(tensors | {"generator": self.generator.get_state()}, scratch, {"progress": json.dumps(saved)})
        scratch.replace(self.file)

    def finish(self) -> None:
        """Remove the record: the conversion is complete."""
        self.file.unlink(missing_ok=True)
