"""What `guard_offset` means for learning: at -17 nothing does, at -8 the balance loss wakes the new expert."""

from __future__ import annotations

import pytest
import torch
from test_moextend_families import BY_NAME, choices_of, extend, logits_of, routers_of

from tiny_moe import NUM_EXPERTS, moe_batch


MIXTRAL = BY_NAME["mixtral"]


@pytest.mark.slow
@pytest.mark.parametrize(("guard_offset", "learns"), [(-17.0, False), (-8.0, True)])
def test_what_a_guarded_expert_learns_from_the_balance_loss(guard_offset, learns):
    model = extend(MIXTRAL, init="copy_guarded", guard_offset=guard_offset, router_aux_loss_coef=0.001)
    torch.testing.assert_close(logits_of(model), logits_of(MIXTRAL.build()), rtol=1e-5, atol=1e-5)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    experts = [parameter for name, parameter in model.named_parameters() if "moextend_experts" in name]
    before = [parameter.detach().clone() for parameter in experts]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    model.train()
    for step in range(300):
        model(**moe_batch(4, 16, seed=step % 8)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    is_moved = any(not torch.equal(parameter, old) for parameter, old in zip(experts, before, strict=True))
    assert is_moved is learns
    assert any((chosen >= NUM_EXPERTS).any() for chosen in choices_of(model.eval())) is learns
    offsets = torch.cat([router.moextend_gate["default"].offset for router in routers_of(model)])
    assert ((offsets - guard_offset).abs().max() > 0.1) == learns
