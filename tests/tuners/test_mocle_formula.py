"""MoCLE computes what the paper's formula says, example by example, and what the released code computes."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from peft_moe import InstructionClusterer, MoCLEConfig
from peft_moe.tuners.mocle import MoCLELayer
from tiny_architectures import ARCHITECTURES
from tiny_models import tiny_llama, token_batch


SETTINGS = {
    "num_clusters": 6,
    "num_experts": 3,
    "cluster_embedding_dim": 5,
    "r": 2,
    "lora_alpha": 3,
    "lora_dropout": 0.0,
    "gate_noise_std": 0.0,
    "temperature": 0.3,
    "init_lora_weights": False,
    "task_type": "CAUSAL_LM",
}
IDS = torch.tensor([4, 1])
FORMS = {
    "paper": {},
    "squared": {"squared_gate": True},
    "squared-top-2": {"squared_gate": True, "top_k": 2},
    "squared-no-universal": {"squared_gate": True, "universal_expert": False},
    "top-2": {"top_k": 2},
    "no-universal": {"universal_expert": False},
    "top-2-no-universal": {"top_k": 2, "universal_expert": False},
    "released-code": {
        **{"gate_scope": "module", "gate_bias": True, "squared_gate": True},
        **{"cluster_embedding_scope": "module", "cluster_embedding_init": "normal"},
    },
    "table-per-layer": {"cluster_embedding_scope": "layer"},
    "rslora": {"use_rslora": True},
}


def build(model=None, **settings):
    model = tiny_llama() if model is None else model
    torch.manual_seed(7)
    return get_peft_model(model, MoCLEConfig(**{**SETTINGS, **settings})).eval()


def layers_of(model) -> dict[str, MoCLELayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, MoCLELayer)}


def parameters_for(model, layer: MoCLELayer, form: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Embedding table, gate weight and gate bias that a layer has to use, found by their place in the model."""
    layers = list(layers_of(model).values())
    block = layer.name.rpartition(".mlp.")[0]
    of_layer = [other for other in layers if other.name.rpartition(".mlp.")[0] == block]
    gate = (layer if form.get("gate_scope") == "module" else of_layer[0]).mocle_gate["default"]
    owner = {"module": layer, "layer": of_layer[0]}.get(form.get("cluster_embedding_scope", "model"), layers[0])
    bias = torch.zeros(gate.weight.shape[0]) if gate.bias is None else gate.bias
    return owner.mocle_embedding["default"].weight.double(), gate.weight.double(), bias.double()


def delta(layer: MoCLELayer, expert: int, x: torch.Tensor, scaling: float) -> torch.Tensor:
    A, B = layer.mocle_A["default"].weight[expert].double(), layer.mocle_B["default"].weight[expert].double()
    return scaling * (x @ A.T) @ B


def oracle(model, layer: MoCLELayer, x: torch.Tensor, form: dict) -> torch.Tensor:
    """`y = W0 x + Σ_e G_e ΔW_e x + (1 - G_max) ΔW_u x` for each example on its own, in float64."""
    table, W, b = parameters_for(model, layer, form)
    scaling = SETTINGS["lora_alpha"] / (SETTINGS["r"] ** 0.5 if form.get("use_rslora") else SETTINGS["r"])
    outputs = []
    for example, cluster in zip(x.double(), IDS.tolist()):
        gates = torch.softmax((W @ table[cluster] + b) / SETTINGS["temperature"], dim=0)
        best = sorted(range(len(gates)), key=lambda e: -float(gates[e]))[: form.get("top_k", 1)]
        y = example @ layer.base_layer.weight.double().T
        for expert in best:
            # the released code: its dispatcher weighs by the gate, its layer again where it adds the universal expert
            is_squared = form.get("squared_gate") and form.get("universal_expert", True)
            weight = gates[expert] * gates.max() if is_squared else gates[expert]
            y = y + weight * delta(layer, expert, example, scaling)
        if form.get("universal_expert", True):
            y = y + (1 - gates.max()) * delta(layer, len(gates), example, scaling)
        outputs.append(y)
    return torch.stack(outputs)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_layer_computes_the_formula(form):
    model = build(**form)
    seen = {}
    for name, layer in layers_of(model).items():
        layer.register_forward_hook(lambda module, args, output, name=name: seen.update({name: (args[0], output)}))
    model(**token_batch(), cluster_ids=IDS)
    assert len(seen) == 6
    for name, (x, output) in seen.items():
        expected = oracle(model, layers_of(model)[name], x, form).float()
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_gradients_are_those_of_the_formula(form):
    model = build(**form)
    layer = layers_of(model)["base_model.model.model.layers.0.mlp.down_proj"]
    parameters = [p for p in model.parameters() if p.requires_grad]
    x = torch.randn(2, 7, layer.in_features)
    upstream = torch.randn(2, 7, layer.out_features)
    with layer.recorder.context.surround({"cluster_ids": IDS}):
        found = torch.autograd.grad((layer(x) * upstream).sum(), parameters, allow_unused=True)
    expected = torch.autograd.grad((oracle(model, layer, x, form) * upstream).sum(), parameters, allow_unused=True)
    assert [g is None for g in found] == [g is None for g in expected]
    assert sum(g is not None for g in found) >= 4
    for gradient, wanted in zip(found, expected):
        if gradient is not None:
            torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)


def test_the_universal_part_vanishes_as_the_gate_approaches_one():
    changes = []
    for temperature in (1.0, 0.1, 1e-4):
        model = build(temperature=temperature)
        whole = model(**token_batch(), cluster_ids=IDS).logits
        for layer in layers_of(model).values():
            layer.mocle_B["default"].weight.data[-1] = 0
        changes.append(float((model(**token_batch(), cluster_ids=IDS).logits - whole).abs().max().detach()))
    assert changes[0] > changes[1] > changes[2] == 0


def test_all_tokens_of_an_example_and_all_linears_of_a_layer_go_to_one_expert():
    model = build()
    for layer in layers_of(model).values():
        with layer.recorder.context.surround({"cluster_ids": IDS}):
            routed = layer.dispatch("default", torch.zeros(2, 9, layer.in_features), torch.zeros(0))[1]
        index = routed.plan.top_k_index.view(2, 9, 2)
        assert (index == index[:, :1]).all()
        expected = layer.scopes["default"].gate_owner
        assert expected.name.startswith(layer.name.rpartition(".mlp.")[0])


def test_equal_clusters_have_equal_outputs_and_order_does_not_matter():
    model = build()
    batch = token_batch(4, num_padding=0)
    ids = torch.tensor([0, 3, 5, 3])
    logits = model(**batch, cluster_ids=ids).logits
    order = torch.tensor([2, 0, 3, 1])
    mixed = model(**{name: value[order] for name, value in batch.items()}, cluster_ids=ids[order]).logits
    torch.testing.assert_close(mixed, logits[order], rtol=1e-5, atol=1e-6)
    alone = model(input_ids=batch["input_ids"][1:2], cluster_ids=ids[1:2]).logits
    torch.testing.assert_close(alone, logits[1:2], rtol=1e-5, atol=1e-6)


def test_the_shared_table_starts_from_the_centroids_and_is_trained():
    clusterer = InstructionClusterer(torch.randn(6, 5), encoder="an/encoder")
    model = get_peft_model(tiny_llama(), MoCLEConfig.from_clusterer(clusterer, task_type="CAUSAL_LM"))
    (table,) = [p for name, p in model.named_parameters() if "mocle_embedding" in name]
    assert torch.equal(table, clusterer.centroids) and table.requires_grad
    (centroids,) = [b for name, b in model.named_buffers() if "mocle_centroids" in name]
    assert torch.equal(centroids, clusterer.centroids) and centroids.data_ptr() != table.data_ptr()


def test_the_released_code_has_a_gate_and_a_random_table_per_linear():
    clusterer = InstructionClusterer(torch.randn(6, 5), encoder="an/encoder")
    config = MoCLEConfig.released_code(num_clusters=6, cluster_embedding_dim=5, task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama(), config)
    tables = [p for name, p in model.named_parameters() if "mocle_embedding" in name]
    assert len(tables) == len(layers_of(model)) == 6
    assert not torch.equal(tables[0], tables[1])
    assert config.squared_gate and config.noise_std == 0.1
    with_centroids = MoCLEConfig.from_clusterer(clusterer, **{"cluster_embedding_init": "normal"})
    model = get_peft_model(tiny_llama(), with_centroids)
    (table,) = [p for name, p in model.named_parameters() if "mocle_embedding" in name]
    assert not torch.equal(table, clusterer.centroids)


@pytest.mark.parametrize(
    ("scopes", "num_tables", "num_gates"),
    [
        (("layer", "model"), 1, 3),
        (("layer", "layer"), 3, 3),
        (("module", "layer"), 3, 6),
        (("module", "module"), 6, 6),
    ],
)
def test_scopes_say_how_many_gates_and_tables_there_are(scopes, num_tables, num_gates):
    model = build(gate_scope=scopes[0], cluster_embedding_scope=scopes[1])
    names = [name for name, _ in model.named_parameters()]
    assert sum("mocle_embedding" in name for name in names) == num_tables
    assert sum("mocle_gate" in name for name in names) == num_gates


def test_without_centroids_the_table_is_about_as_long_as_a_sentence_embedding():
    model = build(cluster_embedding_dim=384)
    (table,) = [p for name, p in model.named_parameters() if "mocle_embedding" in name]
    torch.testing.assert_close(table.norm(dim=1), torch.ones(6), rtol=0.2, atol=0)


def test_noise_is_drawn_in_training_only_once_per_layer_and_is_one_over_e_wide():
    assert MoCLEConfig(num_experts=4).noise_std == 0.25
    model = build(gate_noise_std=2.0)
    batch = {**token_batch(), "cluster_ids": IDS}
    assert torch.equal(model(**batch).logits, model(**batch).logits)
    model.train()
    assert not torch.equal(model(**batch).logits, model(**batch).logits)
    up, down = (layers_of(model)[f"base_model.model.model.layers.1.mlp.{end}_proj"] for end in ("up", "down"))
    with up.recorder.context.surround({"cluster_ids": IDS}):
        one = up.dispatch("default", torch.zeros(2, 9, 32), torch.zeros(0))[1]
        other = down.dispatch("default", torch.zeros(2, 9, 48), torch.zeros(0))[1]
        again = up.dispatch("default", torch.zeros(2, 9, 32), torch.zeros(0))[1]
    assert one.plan is other.plan and one.top_k_weights is other.top_k_weights
    assert not torch.equal(one.top_k_weights, again.top_k_weights)


@pytest.mark.parametrize("kind", ["non_reentrant", "reentrant"])
def test_noise_is_the_same_in_a_recomputation(kind):
    found = []
    for setting in ("none", kind):
        model = build(gate_noise_std=1.0).train()
        if setting != "none":
            model.gradient_checkpointing_enable({"use_reentrant": kind == "reentrant"})
            model.enable_input_require_grads()
        torch.manual_seed(3)
        model(**token_batch(), cluster_ids=IDS).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("kind", ["non_reentrant", "reentrant"])
def test_two_forwards_before_one_backward_keep_their_clusters_under_checkpointing(kind):
    found = []
    for setting in ("none", kind):
        model = build().train()
        if setting != "none":
            model.gradient_checkpointing_enable({"use_reentrant": kind == "reentrant"})
            model.enable_input_require_grads()
        losses = [
            model(**token_batch(seed=s), cluster_ids=torch.tensor(ids)).loss for s, ids in ((1, [0, 4]), (2, [5, 2]))
        ]
        (losses[0] + 3 * losses[1]).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-5, atol=1e-7, msg=name)


def test_a_universal_fallback_uses_the_universal_expert_alone():
    model = build(fallback="universal")
    logits = model(**token_batch()).logits
    for layer in layers_of(model).values():
        layer.mocle_A["default"].weight.data[:-1] = 0
        with torch.no_grad(), layer.recorder.context.surround({}):
            routed = layer.dispatch("default", torch.zeros(2, 9, layer.in_features), torch.zeros(0))[1]
        assert routed.top_k_weights is None and routed.plan.top_k_index.unique().tolist() == [3]
    assert torch.equal(model(**token_batch()).logits, logits)
    assert not torch.equal(model(**token_batch(), cluster_ids=IDS).logits, logits)


@pytest.mark.parametrize("kind", ["non_reentrant", "reentrant"])
def test_checkpointing_routes_linears_that_get_their_tokens_flattened(kind):
    opt = next(architecture for architecture in ARCHITECTURES if architecture.name == "opt")
    found = []
    for is_checkpointed in (False, True):
        model = build(opt.build(), gate_scope="module").train()
        for module in model.modules():
            module.training = hasattr(module, "gradient_checkpointing")
        if is_checkpointed:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": kind == "reentrant"})
        model(**opt.inputs(), cluster_ids=torch.tensor([0, 4])).logits.square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0] and found[0].keys() == found[1].keys()
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-4, atol=1e-6, msg=name)


def test_a_universal_fallback_reaches_every_parameter_as_distributed_training_needs_it():
    model = build(fallback="universal").train()
    model(**token_batch()).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, gradient in gradients.items() if gradient is None} == set()
    assert {name for name, gradient in gradients.items() if gradient.any()} == {
        name for name in gradients if ".mocle_A." in name or ".mocle_B." in name
    }


def test_default_targets_are_up_and_down_of_the_text_mlps():
    assert set(build().peft_config["default"].target_modules) == {"up_proj", "down_proj"}
