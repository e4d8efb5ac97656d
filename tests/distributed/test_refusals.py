"""What is said, in one process, about settings and layouts of distributed training that cannot work."""

from __future__ import annotations

import pytest
import torch
from parallel_cases import moextend, mole, text_batch, train
from peft import get_peft_model
from torch.utils import _pytree

from peft_moe import MoExtendConfig, MoLEConfig
from peft_moe.routing import TopKRouter
from tiny_moe import BY_NAME


@pytest.mark.parametrize("config", [MoLEConfig, MoExtendConfig])
def test_global_balance_of_single_samples_is_refused(config):
    with pytest.raises(ValueError, match="router_aux_loss_scope='global' has no meaning"):
        config(router_aux_loss_scope="global", router_aux_loss_type="mole")


def test_unknown_scope_is_refused():
    with pytest.raises(ValueError, match="router_aux_loss_scope must be one of 'process', 'global'"):
        MoLEConfig(router_aux_loss_scope="rank")


def test_one_process_balances_the_same_in_both_scopes():
    steps = [[[text_batch(0, 0)]]]
    found = [train(mole(router_aux_loss_scope=scope), steps, 1)["weights"] for scope in ("process", "global")]
    assert all(torch.equal(weight, found[1][name]) for name, weight in found[0].items())


def test_output_of_a_router_shows_its_tensors_to_sharding():
    output = TopKRouter(8, 4, top_k=2, gate_scale="prob")(torch.randn(3, 8))
    assert {id(leaf) for leaf in _pytree.tree_leaves(output)} >= {id(output.router_logits), id(output.top_k_weights)}


def mark(model: torch.nn.Module, name: str) -> None:
    """As DeepSpeed ZeRO-3 marks what it has partitioned."""
    for parameter in model.parameters():
        setattr(parameter, name, 0)


def test_new_experts_in_a_partitioned_base_are_refused():
    base = BY_NAME["mixtral"].build()
    mark(base, "ds_id")
    with pytest.raises(ValueError, match=r"is spread over processes .* Load the base model whole"):
        get_peft_model(base, MoExtendConfig(copy_sources={0: 1, 1: 1, 2: 1}))


def test_new_experts_under_zero3_need_whole_mixtures_and_an_input_with_gradient():
    model = moextend().train()
    mark(model, "ds_id")
    with pytest.raises(RuntimeError, match="deepspeed_moe_layer_cls_names"):
        model(**text_batch(0, 0))
    mark(model, "ds_z3_leaf_module")
    with pytest.raises(RuntimeError, match="enable_input_require_grads"):
        model(**text_batch(0, 0))
    model.enable_input_require_grads()
    model(**text_batch(0, 0)).loss.backward()
    assert model.eval()(**text_batch(0, 0)).loss.isfinite()
