"""Pruning: nothing removed is the same decoder, removing zero units loses nothing, sizes are the report's.

python -m pytest tests/modeling/test_pruning.py
"""

import json
import math

import pytest
import torch
from transformers import AutoModel, LlamaConfig, Qwen3Config

from modeling import pruning

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
    "llama": LlamaConfig(**SIZES),
    "llama with biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
}
TOKENS = torch.arange(2, 40)


def decoder(config):
    torch.manual_seed(0)
    model = AutoModel.from_config(config, attn_implementation="sdpa").eval()
    for name, weight in model.named_parameters():  # norms of ones would hide a mixed-up order, biases of zeros too
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    return model


def states(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS[None], use_cache=False).last_hidden_state[0]  # [length, d]


def all_units(model) -> tuple[torch.Tensor, list[torch.Tensor]]:
    config = model.config
    return torch.arange(config.hidden_size), [torch.arange(config.intermediate_size)] * config.num_hidden_layers


@pytest.mark.parametrize("name", CONFIGS)
def test_pruning_nothing_is_the_same_decoder(name):
    model = decoder(CONFIGS[name])
    hidden, mlp = all_units(model)
    same = pruning.keep_units(model, hidden, mlp)
    assert torch.equal(states(same), states(model))
    assert same.config.head_dim == (16 if name == "qwen3" else 8)


@pytest.mark.parametrize("name", CONFIGS)
def test_units_that_are_always_zero_are_no_loss(name):
    model = decoder(CONFIGS[name])
    zero_hidden = [0, 5, 17, 31]
    zero_mlp = [[1, 2], [0, 47], [20, 30]]
    silence(model, zero_hidden, zero_mlp)
    texts = [TOKENS, TOKENS.flip(0)[:7]]
    found = pruning.importance(model, texts)
    hidden = pruning.strongest(found.hidden, 28)
    mlp = [pruning.strongest(of_layer, 46) for of_layer in found.mlp]
    assert set(range(32)) - set(hidden.tolist()) == set(zero_hidden)
    for layer, zeros in enumerate(zero_mlp):
        assert set(range(48)) - set(mlp[layer].tolist()) == set(zeros)

    small = pruning.keep_units(model, hidden, mlp)

    assert small.config.hidden_size == 28
    assert states(model)[:, zero_hidden].abs().max() == 0
    # exact but for the norms' epsilon of 1e-6 beside a mean of squares of this size
    assert torch.allclose(states(small), states(model)[:, hidden], rtol=2e-3, atol=2e-3)
    assert states(small).abs().mean() > 0.1


def silence(model, hidden: list[int], mlp: list[list[int]]) -> None:
    """Make these units zero for any text."""
    with torch.no_grad():
        model.embed_tokens.weight[:, hidden] = 0
        for layer, units in zip(model.layers, mlp, strict=True):
            for output in (layer.self_attn.o_proj, layer.mlp.down_proj):
                output.weight[hidden] = 0
                if output.bias is not None:
                    output.bias[hidden] = 0
            for reading in (layer.mlp.gate_proj, layer.mlp.up_proj):
                reading.weight[units] = 0
                if reading.bias is not None:
                    reading.bias[units] = 0


def test_the_scale_of_the_norms_is_what_keeps_the_function():
    model = decoder(CONFIGS["qwen3"])
    silence(model, [3], [[], [], []])
    hidden, mlp = all_units(model)
    small = pruning.keep_units(model, hidden[hidden != 3], mlp)
    kept = model.norm.weight[hidden[hidden != 3]]
    assert torch.allclose(small.norm.weight, kept * math.sqrt(32 / 31))
    for layer in small.layers:
        layer.input_layernorm.weight.data /= math.sqrt(32 / 31)
    assert (states(small) - states(model)[:, hidden != 3]).abs().max() > 5e-3  # so the test above can fail


@pytest.mark.parametrize("norm", pruning.NORMS)
def test_importance_is_the_norm_over_all_tokens_of_what_each_norm_puts_out(norm):
    model = decoder(CONFIGS["qwen3"])
    texts = [TOKENS, TOKENS[:5]]
    seen = []
    hooks = [model.norm.register_forward_hook(lambda module, inputs, output: seen.append(output[0].detach()))]
    for layer in model.layers:
        for place in (layer.input_layernorm, layer.post_attention_layernorm):
            hooks.append(place.register_forward_hook(lambda module, inputs, output: seen.append(output[0].detach())))
    for tokens in texts:
        states_of = model(input_ids=tokens[None], use_cache=False)
        assert states_of is not None
    for hook in hooks:
        hook.remove()
    places = len(seen) // 2  # in the same order for either text
    order = {"l2": 2, "l1": 1, "max": float("inf")}[norm]
    wanted = torch.zeros(32, dtype=torch.float64)
    for place in range(places):
        both = torch.cat([seen[place], seen[places + place]]).double()  # [tokens, d]
        wanted += torch.linalg.vector_norm(both, ord=order, dim=0)
    found = pruning.importance(model, texts, norm)
    assert places == 7
    assert torch.allclose(found.hidden, wanted)
    assert len(found.mlp) == 3
    assert all(of_layer.min() > 0 for of_layer in found.mlp)


@pytest.mark.parametrize("name", CONFIGS)
def test_heads_their_norms_and_the_vocabulary_stay_as_they_are(name):
    model = decoder(CONFIGS[name])
    hidden, mlp = all_units(model)
    small = pruning.keep_units(model, hidden[:20], [units[:10] for units in mlp])
    own = [name for name in model.state_dict() if ".q_norm." in name or ".k_norm." in name]
    assert len(own) == (2 * 3 if name == "qwen3" else 0)
    for weight in own:
        assert torch.equal(small.state_dict()[weight], model.state_dict()[weight])
    for key in ("num_attention_heads", "num_key_value_heads", "vocab_size"):
        assert getattr(small.config, key) == SIZES[key]
    assert small.layers[0].self_attn.q_proj.weight.shape == model.layers[0].self_attn.q_proj.weight[:, :20].shape
    assert small.embed_tokens.weight.shape == (97, 20)


def test_matryoshka_prefixes_are_none_of_units_that_are_gone():
    config = Qwen3Config(**SIZES, matryoshka_dimensions=[8, 16, 32])
    assert pruning.pruned_config(config, hidden_size=24).matryoshka_dimensions == [8, 16, 24]
    assert pruning.pruned_config(config, hidden_size=32).matryoshka_dimensions == [8, 16, 32]
    assert pruning.pruned_config(config, num_layers=1).matryoshka_dimensions == [8, 16, 32]


@pytest.mark.parametrize("name", CONFIGS)
def test_depth_is_the_first_layers_and_lists_are_cut_with_them(name):
    model = decoder(CONFIGS[name])
    small = pruning.first_layers(model, 2)
    assert small.config.num_hidden_layers == len(small.layers) == 2
    assert len(getattr(small.config, "layer_types", None) or range(2)) == 2
    with torch.no_grad():
        between = model(input_ids=TOKENS[None], use_cache=False, output_hidden_states=True).hidden_states
        assert torch.equal(states(small), model.norm(between[2])[0])
    with pytest.raises(ValueError, match="4 is not between 1 and 3"):
        pruning.first_layers(decoder(CONFIGS["qwen3"]), 4)


def test_of_equal_units_the_first_stay_and_numbers_ascend():
    values = torch.tensor([1.0, 3.0, 1.0, 3.0, 2.0, 1.0])
    assert pruning.strongest(values, 4).tolist() == [0, 1, 3, 4]
    for count in (0, 7):
        with pytest.raises(ValueError, match="between 1 and 6"):
            pruning.strongest(values, count)


def test_a_unit_keeps_its_number_where_there_is_room_for_it():
    units = torch.tensor([0, 1, 4, 5, 6, 9, 30, 31])
    order = pruning.at_their_places(units)
    assert order.tolist() == [0, 1, 9, 30, 4, 5, 6, 31]
    assert sorted(order.tolist()) == units.tolist()


@pytest.mark.parametrize("name", CONFIGS)
def test_the_order_of_residual_units_changes_nothing_but_their_places(name):
    model = decoder(CONFIGS[name])
    _, mlp = all_units(model)
    kept = torch.cat([torch.arange(3, 13), torch.arange(14, 32)])  # 28, a multiple of the heads
    order = pruning.at_their_places(kept)
    assert not torch.equal(order, kept)
    ascending = states(pruning.keep_units(model, kept, mlp))
    placed = states(pruning.keep_units(model, order, mlp))
    assert ascending.abs().mean() > 0.1
    assert torch.allclose(placed, ascending[:, torch.searchsorted(kept, order)], rtol=1e-4, atol=1e-5)


def test_what_cannot_be_pruned_is_refused():
    model = decoder(CONFIGS["qwen3"])
    with pytest.raises(ValueError, match="no text"):
        pruning.importance(model, [])
    with pytest.raises(ValueError, match="norm 'l3'"):
        pruning.importance(model, [TOKENS], "l3")
    with pytest.raises(ValueError, match="only the weights of Qwen3 and Llama"):
        pruning._cut("layers.0.self_attn.qkv_proj.weight", torch.zeros(3, 3), {})


def test_weights_do_not_depend_on_the_larger_decoder():
    model = decoder(CONFIGS["qwen3"])
    hidden, mlp = all_units(model)
    small = pruning.keep_units(model, hidden, mlp)
    before = states(small)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    assert torch.equal(states(small), before)
    assert json.loads(small.config.to_json_string())["model_type"] == "qwen3"
