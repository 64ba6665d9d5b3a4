"""The model's parts, and what transformers does with it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, pipeline

from helpers.tiny_models import byte_tokenizer, convert_tiny, random_ids, save_tiny, tiny_config, tiny_dense
from helpers.tolerances import LOGITS
from recursify.modeling import (
    LayerLayout,
    LayoutError,
    RecursiveConfig,
    RecursiveForCausalLM,
    RelaxedLinear,
    SharedLayer,
    UnsupportedFamily,
)


@pytest.fixture(scope="module")
def relaxed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("relaxed")
    save_tiny(folder / "dense")
    return folder / "recursive", convert_tiny(folder / "dense", folder / "recursive", lora_rank=4)


def test_relaxed_linear_is_its_formula():
    """``y = x Wᵀ + (x A[d]ᵀ) B[d]ᵀ + b[d]``, each depth its own."""
    torch.manual_seed(0)
    module = RelaxedLinear(5, 7, num_depths=3, rank=2, num_biases=3)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(4, 6, 5)
    for depth in range(3):
        wanted = x @ (module.linear.weight + module.lora_b[depth] @ module.lora_a[depth]).T + module.bias[depth]
        torch.testing.assert_close(module(x, depth), wanted)
        torch.testing.assert_close(x @ module.merged_weight(depth).T + module.bias[depth], wanted)


def test_relaxed_linear_survives_tools_that_swap_linears():
    """A quantizer that replaces every ``nn.Linear`` replaces the shared weight and leaves the residual."""
    module = RelaxedLinear(5, 7, num_depths=2, rank=2)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    assert not isinstance(module, nn.Linear)
    x = torch.randn(3, 5)
    before = module(x, 1)
    replacement = nn.Linear(5, 7, bias=False)
    replacement.weight.data.copy_(module.linear.weight)
    module.linear = replacement
    assert torch.equal(module(x, 1), before)


def test_every_weight_is_registered_once(family):
    """No parameter has two names, and the views own none."""
    config = RecursiveConfig.from_dense(tiny_config(family), LayerLayout.fold(6, 2, "cycle"), lora_rank=2)
    model = RecursiveForCausalLM(config)
    names = [name for name, _ in model.named_parameters(remove_duplicate=False) if name != "lm_head.weight"]
    pointers = [p.data_ptr() for n, p in model.named_parameters(remove_duplicate=False) if n != "lm_head.weight"]
    assert len(set(pointers)) == len(names)
    for layer in model.model.block:
        assert not list(layer.views.parameters())


def test_views_call_the_stored_module_after_deepcopy_and_to(relaxed):
    """A copied or moved model computes with its own weights, not with the original's."""
    _, model = relaxed
    other = copy.deepcopy(model).to(torch.float64)
    for layer in other.model.block:
        for path, stored in layer.stored_modules():
            owner, _, name = path.rpartition(".")
            for view in layer.views:
                assert vars(view.get_submodule(owner))[name].stored is stored
    with torch.no_grad():
        other.model.block[0].self_attn.q_proj.linear.weight.zero_()
        ids = random_ids(1, 9)
        assert (other(ids).logits - model(ids).logits).abs().max() > 1e-2


def test_each_position_has_its_own_layer_index(relaxed):
    """Paged attention keys on the module's ``layer_idx``."""
    _, model = relaxed
    indices = [module.layer_idx for module in model.modules() if hasattr(module, "layer_idx")]
    assert sorted(set(indices)) == list(range(6))
    assert len(indices) == 6


def test_tied_norms_are_stored_once():
    """``tie_norms`` keeps one norm for all depths."""
    layout = LayerLayout.fold(6, 2, "cycle")
    own = RecursiveForCausalLM(RecursiveConfig.from_dense(tiny_config("qwen2"), layout))
    tied = RecursiveForCausalLM(RecursiveConfig.from_dense(tiny_config("qwen2"), layout, tie_norms=True))
    assert own.model.block[0].self_attn.q_proj.bias.shape == (2, 32)
    assert tied.model.block[0].self_attn.q_proj.bias.shape == (1, 32)
    assert len(tied.model.block[0].input_layernorm.copies) == 1
    with torch.no_grad():
        assert tied(random_ids(2, 5)).logits.isfinite().all()


def test_unlike_layers_cannot_be_tied():
    """The message names both layers and what differs."""
    config = RecursiveConfig.from_dense(tiny_config("llama"), LayerLayout.fold(6, 2, "cycle"))
    wide = tiny_config("llama", intermediate_size=64)
    with torch.device("meta"):
        layers = [tiny_dense("llama").model.layers[0], AutoModelForCausalLM.from_config(wide).model.layers[3]]
    with pytest.raises(LayoutError, match=r"Layers 0 and 3 cannot share weights: 'mlp\.\w+' is .* and .* in the other"):
        SharedLayer(config, 0, layers)


def test_a_part_that_is_no_linear_and_no_norm_is_refused():
    """Mixture-of-experts weights are three-dimensional."""

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up = nn.Parameter(torch.zeros(4, 3, 2))

    layer = nn.Module()
    layer.mlp = Experts()
    config = RecursiveConfig.from_dense(tiny_config("llama"), LayerLayout.fold(6, 1, "cycle"))
    with pytest.raises(UnsupportedFamily, match=r"'mlp' \(Experts: gate_up \[4, 3, 2\]\) is neither a linear map"):
        SharedLayer(config, 0, [layer])


def test_hidden_states_and_attentions(relaxed):
    """One per effective layer, and the embedding's."""
    _, model = relaxed
    model.set_attn_implementation("eager")
    outputs = model(random_ids(2, 7), output_hidden_states=True, output_attentions=True)
    model.set_attn_implementation("sdpa")
    assert len(outputs.hidden_states) == 7
    assert len(outputs.attentions) == 6


def test_eager_equals_sdpa(relaxed):
    """The family's own attention interface is passed through."""
    _, model = relaxed
    ids = random_ids(2, 13)
    with torch.inference_mode():
        sdpa = model(ids).logits
        model.set_attn_implementation("eager")
        eager = model(ids).logits
        model.set_attn_implementation("sdpa")
    assert (sdpa - eager).abs().max() < LOGITS[torch.float32]


def test_beams_and_sampling(relaxed):
    """Beam search reorders the cache of every position; sampling is seeded."""
    _, model = relaxed
    ids = random_ids(2, 9)
    cached = model.generate(ids, max_new_tokens=6, num_beams=3, do_sample=False, pad_token_id=0)
    uncached = model.generate(ids, max_new_tokens=6, num_beams=3, do_sample=False, pad_token_id=0, use_cache=False)
    assert torch.equal(cached, uncached)
    torch.manual_seed(0)
    first = model.generate(ids, max_new_tokens=6, do_sample=True, top_p=0.9, pad_token_id=0)
    torch.manual_seed(0)
    assert torch.equal(first, model.generate(ids, max_new_tokens=6, do_sample=True, top_p=0.9, pad_token_id=0))


def test_generate_with_a_static_cache(relaxed):
    """``cache_implementation="static"`` prepares masks by itself."""
    _, model = relaxed
    ids = random_ids(2, 9)
    static = model.generate(
        ids, max_new_tokens=6, do_sample=False, pad_token_id=0, cache_implementation="static", disable_compile=True
    )
    assert torch.equal(static, model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0))


def test_pipeline(relaxed):
    """``pipeline("text-generation")`` takes model and tokenizer."""
    folder, _ = relaxed
    byte_tokenizer().save_pretrained(folder)
    writer = pipeline("text-generation", model=str(folder), device="cpu")
    written = writer("abc", max_new_tokens=5, do_sample=False)[0]["generated_text"]
    assert written.startswith("abc")


def test_compiles_in_one_graph(relaxed):
    """No graph break in the whole model, with the same logits."""
    _, model = relaxed
    torch._dynamo.reset()
    ids = random_ids(2, 9)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        difference = (compiled(ids, use_cache=False).logits - model(ids, use_cache=False).logits).abs().max()
    assert difference < LOGITS[torch.float32]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(relaxed, dtype):
    """Loaded in half precision, logits stay near, and decoding runs."""
    folder, model = relaxed
    half = RecursiveForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    ids = random_ids(2, 9)
    assert all(parameter.dtype == dtype for parameter in half.parameters())
    with torch.inference_mode():
        scale = model(ids).logits.std()
        assert (half(ids).logits.float() - model(ids).logits).abs().max() / scale < LOGITS[dtype]
    assert half.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0).shape == (2, 13)


def test_device_map_splits_between_layers(relaxed):
    """accelerate places whole shared layers; offloaded ones compute the same."""
    from accelerate import cpu_offload

    folder, model = relaxed
    placed = RecursiveForCausalLM.from_pretrained(folder, device_map={"": "cpu"}).eval()
    assert set(placed._no_split_modules) == {"SharedLayer", "LlamaDecoderLayer"}
    ids = random_ids(2, 9)
    with torch.inference_mode():
        assert torch.equal(placed(ids).logits, model(ids).logits)
        offloaded = cpu_offload(placed, execution_device=torch.device("cpu"))
        assert torch.equal(offloaded(ids).logits, model(ids).logits)


def test_saved_again_is_the_same(relaxed, tmp_path):
    """``save_pretrained`` writes the travelling code and loads to the bit, sharded too."""
    _, model = relaxed
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    for file in ("configuration_recursive.py", "modeling_recursive.py", "recursive_layout.py"):
        assert (tmp_path / file).exists()
    ids = random_ids(2, 9)
    with torch.inference_mode():
        assert torch.equal(RecursiveForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


def test_vllm_transformers_backend_contract(relaxed):
    """What vLLM's Transformers backend asks of a model, as far as a stub can ask it.

    It builds ``AutoModel.from_config``, makes one attention instance per index below ``num_hidden_layers``, calls the
    base model without a cache, and finds the instance by the module's ``layer_idx`` in keyword arguments that must be
    handed down untouched.
    """
    from transformers import AttentionInterface, AutoModel

    folder, model = relaxed
    config = RecursiveConfig.from_pretrained(folder)
    used: list[int] = []

    def attention(module, query, key, value, mask, scaling=None, attention_instances=None, **kwargs):
        assert attention_instances is not None
        used.append(attention_instances[module.layer_idx])
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        value = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
        out = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("stub_engine", attention)
    base = AutoModel.from_config(config, attn_implementation="stub_engine").eval()
    base.load_state_dict(model.model.state_dict())
    assert base.is_backend_compatible()
    ids = random_ids(1, 9)
    with torch.inference_mode():
        hidden = base(
            input_ids=ids,
            use_cache=False,
            position_ids=torch.arange(9)[None],
            attention_instances={index: index for index in range(config.num_hidden_layers)},
            return_dict=False,
        )[0]
        assert used == list(range(config.num_hidden_layers))
        assert (hidden - model.model(ids).last_hidden_state).abs().max() < LOGITS[torch.float32]


@pytest.mark.parametrize("shape", [(2, 40), (80,)])
def test_merged_training_is_the_residual_beside_the_weight(shape):
    """Outputs and all gradients, at every depth; decoding, frozen weights and quantizers keep the residual apart."""
    torch.manual_seed(0)
    layer = RelaxedLinear(24, 40, num_depths=2, rank=4, num_biases=2).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(*shape, 24, dtype=torch.float64, requires_grad=True)
    assert layer.train()._merging_is_cheaper(x)
    assert not layer._merging_is_cheaper(x[..., :1, :])
    assert not layer.eval()._merging_is_cheaper(x)
    with torch.no_grad():
        assert not layer.train()._merging_is_cheaper(x)
    everything = [x, *layer.parameters()]
    target = torch.randn(*shape, 40, dtype=torch.float64)
    results = []
    for merges in (True, False):
        y = [layer.train(merges)(x, depth) for depth in range(2)]
        results.append([*y, *torch.autograd.grad(sum(((part - target) ** 2).sum() for part in y), everything)])
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected)
    layer.train().linear.requires_grad_(False)
    assert not layer._merging_is_cheaper(x)


def test_merged_training_under_autocast():
    """Products in bfloat16, gradients in the weights' float32."""
    torch.manual_seed(0)
    layer = RelaxedLinear(24, 40, num_depths=2, rank=4)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(80, 24, requires_grad=True)
    results = []
    for merges in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            y = layer.train(merges)(x, 1)
        assert y.dtype == torch.bfloat16
        grads = torch.autograd.grad(y.float().sum(), [x, *layer.parameters()])
        assert all(grad.dtype == torch.float32 for grad in grads)
        results.append([y, *grads])
    for mine, expected in zip(*results, strict=True):
        assert (mine - expected).norm() < 2e-2 * expected.norm()
