"""FSDP2: two processes with half the weights each are one process."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.processes import run, start_all
from helpers.runs import BASE, assert_same, make_source, weights
from recursify.errors import SettingsError, TrainingError
from recursify.modeling import RecursiveForCausalLM
from recursify.uptrain import checkpoints, sharding
from recursify.uptrain.run import uptrain_model
from recursify.uptrain.settings import UptrainSettings

pytestmark = pytest.mark.xdist_group("uptraining")

SHARDED = replace(BASE, batch_size=2, sharding="fsdp2")


def test_killed_and_resumed_two_processes_are_one(source, plain, tmp_path):
    """Losses, held-out figures and weights; each checkpoint holds two shards, the finished folder each tensor once."""
    output = tmp_path / "out"
    processes = start_all(tmp_path / "log", source, output, SHARDED, die_at_tokens=5 * 4 * 32, world_size=2)
    for process in processes:
        process.join(120)
    assert all(process.exitcode for process in processes)
    newest = checkpoints.list_checkpoints(output / "checkpoints")[-1]
    assert newest.name == "checkpoint-4"
    assert len(list((newest / sharding.SHARDS_FOLDER).glob("*.distcp"))) == 2
    assert not (output / "config.json").exists()

    run(tmp_path / "log", source, output, SHARDED, world_size=2, resume=True)
    assert_same(plain[0], output)
    assert json.loads((output / "config.json").read_text())["architectures"] == ["RecursiveForCausalLM"]
    finished = weights(output)
    (output / "config.json").unlink()
    run(tmp_path / "log", source, output, SHARDED, world_size=2, resume=True)
    assert all(torch.equal(weight, finished[name]) for name, weight in weights(output).items())


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """A recursive model whose head is its embedding."""
    return make_source(tmp_path_factory.mktemp("tied"), dense={"tie_word_embeddings": True})


def test_tied_head_recomputed_activations_and_random_recursions(tied, tmp_path):
    """With half of the depths missing in some steps, activations made twice, and the embedding learning as the head."""
    settings = replace(BASE, random_recursions=True, recursion_curriculum=0.0, seed=3)
    uptrain_model(tied, tmp_path / "one", settings=settings)
    both = replace(settings, batch_size=1, accumulate=2, sharding="fsdp2", gradient_checkpointing=True)
    run(tmp_path / "log", tied, tmp_path / "two", both, world_size=2)
    assert_same(tmp_path / "one", tmp_path / "two")


class Collectives(TorchDispatchMode):
    """Counts what the processes tell each other."""

    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            self.counts[function.__name__.split(".")[0]] += 1
        return function(*args, **(kwargs or {}))


def count_gathers(folder):
    """One forward, in each of two processes."""
    dist.init_process_group("gloo")
    model = RecursiveForCausalLM.from_pretrained(folder).train()
    sharding.shard(model)
    tokens = torch.arange(8).unsqueeze(0)
    with Collectives() as collectives:
        loss = model(tokens, labels=tokens).loss
    layout = model.config.layout
    assert layout.num_recursions == 2
    layers = layout.num_prelude_layers + layout.block_size + layout.num_coda_layers
    assert collectives.counts == {"_allgather_base_": layers + 1}, collectives.counts
    loss.backward()
    assert type(model).__name__ == "FSDPRecursiveForCausalLM"
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    dist.destroy_process_group()


def test_a_shared_layer_is_gathered_once_for_all_recursions(tied, tmp_path):
    """One gathering per layer, and one for embedding, norm and head."""
    run(tmp_path / "log", tied, function=count_gathers, world_size=2)


def test_what_cannot_be_sharded(source, tmp_path, monkeypatch):
    """One process; a weight that leaves some process without a part; FSDP by someone else; DeepSpeed not installed."""
    assert "RANK" not in os.environ
    with pytest.raises(TrainingError, match=r"but there is one\. Give --num-processes"):
        uptrain_model(source, tmp_path / "out", settings=replace(BASE, sharding="fsdp2"))
    assert sharding._dimension("a", torch.empty(3, 4, 32), 8) == 2
    assert sharding._dimension("a", torch.empty(49_151, 30), 8) == 0
    with pytest.raises(TrainingError, match=r"'a' \[9\] cannot be split into 8 shards"):
        sharding._dimension("a", torch.empty(9), 8)
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(SettingsError, match=r"'zero2' needs DeepSpeed.* pip install deepspeed"):
        uptrain_model(source, tmp_path / "out", settings=replace(BASE, sharding="zero2"))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(SettingsError, match=r"to shard the model \(ACCELERATE_USE_FSDP\).*use --sharding fsdp2"):
        uptrain_model(source, tmp_path / "out", settings=BASE)
    with pytest.raises(SettingsError, match="Use sharding: fsdp2"):
        UptrainSettings(trainer={"fsdp": True})
    with pytest.raises(SettingsError, match=r"Unknown sharding 'zero3'\. Use one of: none, fsdp2, zero2"):
        UptrainSettings(sharding="zero3")
