"""The copy of a router that runs with further rows: nothing in it is out of date, and the router stays as it was."""

from __future__ import annotations

import copy
import types
from functools import partial
from operator import attrgetter

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel
from test_moextend_families import BY_NAME, config_for, every_family, extend, logits_of, routers_of
from torch.distributed.fsdp import FullyShardedDataParallel

from peft_moe.foreign_moe import gate_weight_name
from tiny_moe import NUM_EXPERTS


MIXTRAL = BY_NAME["mixtral"]


def described(module) -> dict:
    """Attributes of a module and of all inside it, with the identity of its tensors."""
    return {
        (name, key): {n: id(t) for n, t in value.items()} if isinstance(value, dict) else value
        for name, inner in module.named_modules()
        for key, value in inner.__dict__.items()
    }


@every_family
@pytest.mark.parametrize("init", ["copy", "copy_guarded"])
def test_it_leaves_the_router_alone(family, init):
    if init == "copy_guarded" and not family.is_linear:
        pytest.skip("the router has no place for an offset")
    model = extend(family, shake=0.1, init=init, guard_offset=-0.5, num_new_experts=2)
    router = routers_of(model)[0].base_layer
    sizes = []
    router.register_forward_hook(lambda module, args, output: sizes.append(attrgetter(weight)(module).shape))
    weight = gate_weight_name(router, NUM_EXPERTS)
    before = described(router)
    logits_of(model)
    assert described(router) == before
    assert sizes == [(NUM_EXPERTS + 2, 32 + (init == "copy_guarded"))]


def changed_by_an_optimizer(model: PeftModel) -> None:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 0.5)
    torch.optim.SGD(parameters, lr=0.1).step()


def changed_through_data(model: PeftModel) -> None:
    for router in routers_of(model):
        router.moextend_gate["default"].weight.data.mul_(-1)


def changed_by_loading(model: PeftModel) -> None:
    state = {name: -tensor for name, tensor in model.state_dict().items() if "moextend_gate" in name}
    model.load_state_dict(state, strict=False)


def changed_in_the_base_model(model: PeftModel) -> None:
    for router in routers_of(model):
        router.base_layer.weight.data.mul_(-1)


CHANGES = [changed_by_an_optimizer, changed_through_data, changed_by_loading, changed_in_the_base_model]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_acts_at_once(change):
    model = extend(MIXTRAL, shake=0.1)
    before = logits_of(model)
    change(model)
    found = logits_of(model)
    assert not torch.equal(found, before)
    assert torch.equal(found, logits_of(copy.deepcopy(model)))


def test_adapters_are_switched_at_once():
    model = extend(MIXTRAL, shake=0.1)
    first = logits_of(model)
    model.add_adapter("other", config_for(MIXTRAL, num_new_experts=2, init="mean_gate"))
    model.set_adapter("other")
    second = logits_of(model.eval())
    model.set_adapter("default")
    assert torch.equal(logits_of(model), first) and not torch.equal(second, first)
    assert torch.equal(second, logits_of(extend(MIXTRAL, num_new_experts=2, init="mean_gate")))


def test_another_type_of_tensor_acts_at_once():
    model = extend(MIXTRAL, shake=0.1)
    logits_of(model)
    assert logits_of(model.bfloat16()).dtype == torch.bfloat16
    assert routers_of(model)[0].base_layer.weight.dtype == torch.bfloat16


def test_weights_that_fsdp_gathers_are_those_that_count():
    model = extend(MIXTRAL, shake=0.1)
    expected = logits_of(model)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        sharded = FullyShardedDataParallel(model, use_orig_params=True, device_id="cpu")
        assert torch.equal(logits_of(sharded), expected)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("bind", [partial, types.MethodType])
def test_a_router_whose_forward_was_replaced_is_called_as_it_is(bind):
    model = extend(MIXTRAL, shake=0.1)
    expected = logits_of(model)
    calls = []

    def other(module, *args):
        calls.append(module.weight.shape[0])
        return type(module).forward(module, *args)

    for router in routers_of(model):
        router.base_layer.forward = bind(other, router.base_layer)
    assert torch.equal(logits_of(model), expected)
    assert calls == [5, 5, 5]
    routers_of(model)[0].base_layer.forward = lambda *args: other(routers_of(model)[0].base_layer, *args)
    with pytest.raises(RuntimeError, match="forward of MixtralTopKRouter was replaced by.*Bind it to the router"):
        logits_of(model)


def test_where_nobody_chooses_a_new_expert_the_old_ones_run_as_they_are():
    model = extend(MIXTRAL, init="copy_guarded")
    calls = []
    for module in model.modules():
        if hasattr(module, "moextend_experts"):
            module.base_layer.register_forward_pre_hook(lambda module, args: calls.append(args[0].shape))
            module.moextend_experts["default"].register_forward_pre_hook(lambda *_: pytest.fail("was called"))
    logits_of(model)
    assert calls == [torch.Size([16, 32])] * 3
