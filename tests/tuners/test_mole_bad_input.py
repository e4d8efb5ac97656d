"""Bad input is refused with what was wrong, what was found and what to do, and leaves everything as it was."""

from __future__ import annotations

import json
import re

import pytest
import safetensors
import safetensors.torch
import torch
import torch.distributed as dist
from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from peft_moe import MoLEConfig
from peft_moe.tuners.mole import MoLELayer
from tiny_models import tiny_llama, token_batch


BAD_FIELDS = [
    ("too-many-choices", {"top_k": 5, "num_experts": 3}, "top_k is 5 and num_experts is 3. Lower top_k"),
    ("no-rank", {"r": 0}, "r must be a whole number of at least 1, but is 0"),
    ("rank-as-text", {"r": "8"}, "r must be a whole number of at least 1, but is '8'"),
    ("fraction-of-an-expert", {"num_experts": 2.5}, "num_experts must be a whole number of at least 1, but is 2.5"),
    ("yes-as-top-k", {"top_k": True}, "top_k must be a whole number of at least 1, but is True"),
    ("no-alpha", {"lora_alpha": 0}, "lora_alpha must be a positive number, but is 0"),
    ("alpha-as-text", {"lora_alpha": "16"}, "lora_alpha must be a positive number, but is '16'"),
    ("dropout-of-everything", {"lora_dropout": 1.0}, "lora_dropout must be in [0, 1), but is 1.0"),
    ("dropout-as-text", {"lora_dropout": "0.1"}, "lora_dropout must be in [0, 1), but is '0.1'"),
    ("negative-noise", {"router_jitter_noise": -0.1}, "router_jitter_noise must be in [0, 1), but is -0.1"),
    (
        "negative-loss",
        {"router_aux_loss_coef": -1},
        "router_aux_loss_coef must be a number and not negative, but is -1",
    ),
    ("loss-nan", {"router_z_loss_coef": float("nan")}, "router_z_loss_coef must be a number and not negative"),
    ("unknown-gate", {"gate_scale": "probs"}, "gate_scale must be one of 'none', 'straight_through', 'prob', but is"),
    ("untrained-router", {"gate_scale": "none", "router_aux_loss_coef": 0.0}, "leaves routers without any gradient"),
    ("unknown-scope", {"router_scope": "layer"}, "router_scope must be one of 'mlp', 'module', but is 'layer'"),
    (
        "unknown-loss",
        {"router_aux_loss_type": "gshard"},
        "router_aux_loss_type must be one of 'switch', 'pooled', 'mole'",
    ),
    ("unknown-init", {"init_lora_weights": "pissa"}, "init_lora_weights must be one of True, False, 'gaussian'"),
    ("half-precision-router", {"router_dtype": "float16"}, "router_dtype must be 'float32', but is 'float16'"),
    ("half-precision-dtype", {"router_dtype": torch.float16}, "router_dtype must be 'float32', but is torch.float16"),
    ("soft-as-text", {"soft": "yes"}, "soft must be True or False, but is 'yes'"),
    ("alpha-beyond-float32", {"lora_alpha": 1e308}, "lora_alpha must be a positive number, but is 1e+308"),
    ("alpha-beyond-any-float", {"lora_alpha": 10**400}, "lora_alpha must be a positive number, but is 1000"),
    ("infinite-alpha", {"alpha_pattern": {"up_proj": float("inf")}}, "alpha_pattern['up_proj'] must be a positive"),
    ("targets-as-broken-expression", {"target_modules": "("}, "target_modules is '(', which is no regular expression"),
    ("targets-of-lists", {"exclude_modules": [["up_proj"]]}, "exclude_modules must be a list of names, but is [["),
    (
        "layer-as-fraction",
        {"layers_to_transform": 2.5},
        "layers_to_transform must be a layer number or a list of them",
    ),
    ("layer-as-text", {"layers_to_transform": ["0"]}, "layers_to_transform must be a layer number or a list of them"),
    ("format-as-text", {"checkpoint_format": "1"}, "checkpoint_format of a MoLE adapter must be a whole number"),
    ("targets-as-number", {"target_modules": 3}, "target_modules must be a list of names, but is 3"),
    ("targets-of-numbers", {"target_modules": [3]}, "target_modules must be a list of names"),
    (
        "saved-module-as-text",
        {"modules_to_save": "lm_head"},
        "modules_to_save must be a list of names, but is 'lm_head'",
    ),
    ("pattern-as-list", {"rank_pattern": ["x"]}, "rank_pattern must be a dictionary from names to numbers"),
    ("rank-of-nothing", {"rank_pattern": {"up_proj": 0}}, "rank_pattern['up_proj'] must be at least 1, but is 0"),
    ("alpha-of-nothing", {"alpha_pattern": {"up_proj": 0}}, "alpha_pattern['up_proj'] must be a positive number"),
    (
        "broken-expression",
        {"rank_pattern": {"up_proj(": 2}},
        "rank_pattern has the key 'up_proj(', which is no regular",
    ),
    ("fewer-experts-than-choices", {"top_k": 3, "num_experts_pattern": {"mlp": 2}}, "which is less than top_k=3"),
    (
        "pooled-loss-of-unequal-routers",
        {"num_experts_pattern": {"mlp": 2}, "router_aux_loss_type": "pooled"},
        "needs the same number of experts everywhere. Use 'switch'",
    ),
    (
        "pattern-without-layers",
        {"layers_pattern": "layers"},
        "layers_pattern has no effect without layers_to_transform",
    ),
    (
        "layers-and-expression",
        {"layers_to_transform": 1, "target_modules": ".*mlp.*"},
        "Put the layer numbers into the expression",
    ),
    (
        "unknown-backend",
        {"kernel_backend": "grouped_m"},
        "There is no kernel backend 'grouped_m'. Did you mean 'grouped_mm'?",
    ),
    ("backend-as-nothing", {"kernel_backend": None}, "There is no kernel backend 'None'. Pass 'auto' or one of"),
]


@pytest.mark.parametrize(
    ("fields", "message"), [pytest.param(fields, message, id=name) for name, fields, message in BAD_FIELDS]
)
def test_bad_field_is_refused_by_the_config(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        MoLEConfig(**fields)


@pytest.mark.parametrize(
    "more", [{"router_z_loss_coef": 0.1}, {"soft": True}, {"num_experts": 1}, {"inference_mode": True}]
)
def test_routers_without_a_gradient_from_the_task(more):
    MoLEConfig(gate_scale="none", router_aux_loss_coef=0.0, **more)


def test_all_problems_are_named_at_once():
    with pytest.raises(ValueError) as error:
        MoLEConfig(r=0, lora_dropout=2, gate_scale="x", soft=1, kernel_backend="y", rank_pattern={"a": 0})
    message = str(error.value)
    assert message.startswith("MoLEConfig cannot be used:\n")
    assert message.count("\n  - ") == 6


def test_a_dtype_object_for_the_router_is_saved_as_its_name(tmp_path):
    MoLEConfig(router_dtype=torch.float32).save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).router_dtype == "float32"


def untouched(model) -> bool:
    return not any(isinstance(module, MoLELayer) for module in model.modules())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        pytest.param(
            {"target_modules": ["mlpx"]},
            r"Target modules \['mlpx'\] not found.*no module of LlamaForCausalLM gets experts.*named_modules",
            id="no-such-module",
        ),
        pytest.param(
            {"target_modules": ["up_proj"], "exclude_modules": ["up_proj"]},
            r"no module of LlamaForCausalLM gets experts.*exclude_modules",
            id="everything-excluded",
        ),
        pytest.param(
            {"target_modules": ["gate_proj", "act_fn"]},
            r"needs nn.Linear, but 'model.layers.0.mlp.act_fn' is SiLU\w*. "
            r"Remove it with exclude_modules=\['act_fn'\]",
            id="no-linear",
        ),
        pytest.param(
            {"target_modules": ["embed_tokens"]},
            "needs nn.Linear, but 'model.embed_tokens' is Embedding",
            id="embedding",
        ),
        pytest.param(
            {"lora_target_modules": ["q_proj", "up_proj"]},
            r"'model.layers.0.mlp.up_proj' is in target_modules and in lora_target_modules.*remove it from one",
            id="two-roles",
        ),
        pytest.param(
            {"num_experts_pattern": {"layers.0.mlp.up_proj": 5}},
            r"num_experts_pattern gives 'model.layers.0.mlp.up_proj' 5 experts, but '.*gate_proj' 3.*name of the MLP",
            id="half-an-mlp",
        ),
    ],
)
def test_bad_target_is_refused_before_the_model_is_touched(settings, message):
    model = tiny_llama()
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, MoLEConfig(**settings))
    assert untouched(model)
    get_peft_model(model, MoLEConfig())(**token_batch())


def test_a_linear_that_is_split_over_processes_is_refused():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = tiny_llama()
        linear = model.model.layers[0].mlp.up_proj
        mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("tp",))
        linear.weight = torch.nn.Parameter(distribute_tensor(linear.weight.detach(), mesh, [Shard(0)]))
        with pytest.raises(ValueError, match=r"'model.layers.0.mlp.up_proj' is split over processes.*without tp_plan"):
            get_peft_model(model, MoLEConfig())
        assert untouched(model)
    finally:
        dist.destroy_process_group()


def wrapped(**settings):
    settings = {"r": 2, "init_lora_weights": False, "lora_dropout": 0.0, "task_type": "CAUSAL_LM", **settings}
    torch.manual_seed(3)
    return get_peft_model(tiny_llama(), MoLEConfig(**settings)).eval()


def logits(model):
    with torch.no_grad():
        return model(**token_batch()).logits


@pytest.fixture
def saved(tmp_path):
    """A folder with a good adapter."""
    wrapped().save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder, change) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})


def without_an_expert_tensor(tensors):
    del tensors[next(name for name in tensors if "mole_B" in name)]


def with_other_experts(tensors):
    name = next(name for name in tensors if "mole_router.weight" in name)
    tensors[name] = torch.zeros(7, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_an_expert_tensor, r"1 tensors are missing from the file, for example .*mole_B"),
        (with_other_experts, r"1 tensors have another shape.*\(7, 32\) in the file, \(3, 32\) in the model"),
    ],
    ids=lambda value: value.__name__.replace("_", "-") if callable(value) else "",
)
def test_file_that_does_not_fit_is_refused_and_the_other_adapter_works_on(saved, change, message):
    rewrite(saved, change)
    with pytest.raises(
        ValueError, match=rf"The saved weights do not fit the adapter 'default': {message}.*Nothing was"
    ):
        PeftModel.from_pretrained(tiny_llama(), saved)

    model = wrapped()
    expected = logits(model)
    with pytest.raises(ValueError, match="do not fit the adapter 'broken'"):
        model.load_adapter(saved, adapter_name="broken")
    assert torch.equal(logits(model), expected)
    model.delete_adapter("broken")
    wrapped().save_pretrained(saved)
    model.load_adapter(saved, adapter_name="broken")
    model.set_adapter("broken")
    assert torch.equal(logits(model), expected)


def test_file_that_does_not_fit_changes_no_weight_of_a_loaded_adapter(saved):
    model = wrapped(num_experts=4)
    expected = logits(model)
    weights = safetensors.torch.load_file(saved / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="have another shape"):
        set_peft_model_state_dict(model, weights)
    assert torch.equal(logits(model), expected)


def edit_config(folder, **fields) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_checkpoint_of_a_newer_version_asks_for_an_upgrade(saved):
    edit_config(saved, checkpoint_format=2)
    with pytest.raises(
        ValueError, match=r"MoLE adapter has checkpoint format 2.*reads up to 1.*pip install --upgrade"
    ):
        PeftModel.from_pretrained(tiny_llama(), saved)


def test_backend_that_was_removed_gives_way_to_auto_with_one_warning(saved, recwarn):
    expected = logits(PeftModel.from_pretrained(tiny_llama(), saved).eval())
    edit_config(saved, kernel_backend="segment")
    model = PeftModel.from_pretrained(tiny_llama(), saved).eval()
    assert [str(w.message).partition(" was removed")[0] for w in recwarn if "segment" in str(w.message)] == [
        "MoLEConfig: kernel_backend='segment'"
    ]
    assert model.peft_config["default"].kernel_backend == "auto"
    assert torch.equal(logits(model), expected)


def test_unknown_field_of_a_newer_version_is_named(saved, recwarn):
    expected = logits(PeftModel.from_pretrained(tiny_llama(), saved).eval())
    edit_config(saved, router_temperature=0.5)
    model = PeftModel.from_pretrained(tiny_llama(), saved).eval()
    assert any("router_temperature" in str(warning.message) for warning in recwarn)
    assert torch.equal(logits(model), expected)


def test_newer_checkpoint_with_unknown_fields_asks_for_an_upgrade_too(saved):
    edit_config(saved, checkpoint_format=2, router_temperature=0.5)
    with pytest.raises(ValueError, match="pip install --upgrade"):
        PeftConfig.from_pretrained(saved)


@pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload"])
def test_merging_is_refused_and_leaves_the_model_as_it_is(method):
    model = wrapped()
    expected = logits(model)
    with pytest.raises(ValueError, match=r"3 experts .* cannot be merged .*num_experts=1.*unload\(\)"):
        getattr(model, method)()
    assert torch.equal(logits(model), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny_llama().eval()))


@pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload"])
def test_a_single_expert_merges_exactly(method):
    model = wrapped(num_experts=1)
    expected = logits(model)
    merged = getattr(model, method)() or model
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-6)
    if method == "merge_and_unload":
        assert untouched(merged)
        return
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)


def test_merging_one_of_two_adapters_asks_only_about_that_one():
    model = wrapped(num_experts=1)
    model.add_adapter("routed", MoLEConfig(r=2))
    model.merge_adapter(["default"])
    model.unmerge_adapter()
    with pytest.raises(ValueError, match="cannot be merged"):
        model.merge_adapter(["routed"])


def test_safe_merge_refuses_weights_that_are_not_finite():
    model = wrapped(num_experts=1)
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    layer.mole_B["default"].weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="The adapter default seems to be broken.*not finite.*nothing was merged"):
        model.merge_adapter(safe_merge=True)
    assert torch.isfinite(layer.base_layer.weight).all()


def test_router_that_diverged_is_named():
    model = wrapped()
    router = model.get_base_model().model.layers[1].mlp.gate_proj.mole_router["default"]
    router.weight.data[0, 0] = float("nan")
    with pytest.raises(
        FloatingPointError, match=r"router of 'model.layers.1.mlp' \(adapter 'default'\).*learning rate"
    ):
        model(**token_batch())
    router.weight.data.zero_()
    model.train()(**token_batch()).loss.backward()


def test_batch_of_padding_gives_a_finite_gradient():
    model = wrapped(router_aux_loss_coef=0.1, router_z_loss_coef=0.1).train()
    batch = token_batch()
    batch["attention_mask"] = torch.zeros_like(batch["attention_mask"])
    model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_batch_without_a_token_is_no_error():
    model = wrapped()
    mlp = model.get_base_model().model.layers[0].mlp
    assert mlp(torch.zeros(1, 0, 32)).shape == (1, 0, 32)


def test_named_backend_is_used():
    model = wrapped(kernel_backend="eager")
    torch.testing.assert_close(logits(model), logits(wrapped(kernel_backend="dense")), rtol=1e-5, atol=1e-5)


def test_named_backend_that_cannot_run_says_why():
    model = wrapped(kernel_backend="plain")
    with pytest.raises(RuntimeError, match="'plain'.*cannot run this case.*Use backend='auto'"):
        model(**token_batch())
