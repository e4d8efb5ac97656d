"""`experts_implementation="peft_moe"` hands on to transformers, `"peft_moe_triton"` never does."""

from __future__ import annotations

import pytest
import torch
from ffn_cases import CASES, expected, inputs, make, oracle, relative, with_gradients
from packaging.version import Version
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from transformers import MixtralForCausalLM

from peft_moe.kernels import explain_ffn_experts, ffn
from peft_moe.kernels.ffn import ffn_experts_forward, ffn_triton_forward
from tiny_moe import BY_NAME, FAMILIES


MIXTRAL = BY_NAME["mixtral"].build


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_those_of_the_loop_over_tokens(name):
    found = with_gradients(ffn_experts_forward, make(CASES[name]), *inputs(CASES[name]))
    assert relative(found, expected(CASES[name], torch.float32)) <= 1e-5


@pytest.mark.parametrize("name", ["top_2", "transposed", "own_gate", "plain", "odd_sizes"])
@pytest.mark.parametrize(
    ("dtype", "is_autocast", "limit"),
    [
        (torch.float64, False, 1e-12),
        (torch.bfloat16, False, 1e-2),
        (torch.float16, False, 2e-3),
        (torch.float32, True, 3e-2),
    ],
    ids=["float64", "bfloat16", "float16", "autocast"],
)
def test_what_it_hands_on_to_computes_as_the_loop_does_in_every_dtype(name, dtype, is_autocast, limit):
    experts, (x, index, weights) = make(CASES[name], dtype), inputs(CASES[name], dtype)
    weights = weights.to(torch.promote_types(dtype, torch.float32))
    says = "grouped_mm: dtype and widths are for it"
    if name == "odd_sizes":
        says = "batched_mm: grouped_mm demands that rows be multiples of 16 bytes"
    if dtype == torch.float64:
        says = "batched_mm: grouped_mm does not take float64"
    assert explain_ffn_experts(experts) == says
    with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        found = with_gradients(ffn_experts_forward, experts, x, index, weights)
    assert [tensor.dtype for tensor in found] == [dtype, dtype, weights.dtype, *[dtype] * (len(found) - 3)]
    assert relative(found, expected(CASES[name], dtype)) <= limit


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_family_computes_what_its_own_code_does(family):
    model = family.build()
    tokens = torch.arange(3, 35).view(2, 16)
    model.requires_grad_(True)
    found = []
    for implementation in ("eager", "peft_moe"):
        model.set_experts_implementation(implementation)
        model.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if ".experts." in n and p.grad is not None}
        assert grads
        found.append((loss.detach(), grads))
    (loss, grads), (our_loss, our_grads) = found
    assert torch.allclose(loss, our_loss, atol=1e-5)
    for name, grad in grads.items():
        assert torch.allclose(our_grads[name], grad, atol=1e-4 * grad.abs().max() + 1e-8), name


def test_from_pretrained_takes_the_name_and_generates(tmp_path):
    MIXTRAL().save_pretrained(tmp_path)
    model = MixtralForCausalLM.from_pretrained(tmp_path, experts_implementation="peft_moe").eval()
    assert model.config._experts_implementation == "peft_moe"
    eager = MixtralForCausalLM.from_pretrained(tmp_path, experts_implementation="eager").eval()
    prompt = torch.tensor([[5, 6, 7]])
    tokens = [m.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0) for m in (model, eager)]
    assert torch.equal(*tokens)


def test_lora_on_the_experts_trains():
    from peft import LoraConfig, get_peft_model

    def gradients(implementation):
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
        model = get_peft_model(MIXTRAL(), config)
        model.base_model.model.set_experts_implementation(implementation)
        tokens = torch.arange(16).view(1, 16)
        model(input_ids=tokens, labels=tokens).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    theirs, ours = gradients("eager"), gradients("peft_moe")
    assert theirs
    for name, grad in theirs.items():
        assert torch.allclose(ours[name], grad, atol=1e-6), name


@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.9"),
    reason="the compiler of older torch cannot trace the cache of transformers",
)
def test_compiled_models_run_grouped_mm():
    torch._dynamo.reset()
    model = MIXTRAL()
    model.set_experts_implementation("peft_moe")
    tokens = torch.arange(8).view(1, 8)
    with torch.no_grad():
        wanted = model(tokens).logits
        found = torch.compile(model, fullgraph=True, backend="aot_eager")(tokens).logits
    assert torch.allclose(found, wanted, atol=1e-5)


def test_sizes_that_grouped_mm_refuses_compile_too():
    torch._dynamo.reset()
    experts, given = make(CASES["odd_sizes"]).requires_grad_(False), inputs(CASES["odd_sizes"])
    found = torch.compile(experts, fullgraph=True, backend="aot_eager")(*given)
    torch.testing.assert_close(found, oracle(experts, *given))


def test_only_names_of_this_package_are_explained():
    with pytest.raises(ValueError, match="'peft_moe' and 'peft_moe_triton', but got implementation='grouped_mm'"):
        explain_ffn_experts(make(CASES["top_2"]), implementation="grouped_mm")


def with_norm(experts):
    experts.has_post_expert_norm = True


def with_scale(experts):
    experts.scale = nn.Parameter(torch.ones(1))


def of_integers(experts):
    experts.down_proj = nn.Parameter(experts.down_proj.data.to(torch.int8), requires_grad=False)


def of_wrappers(experts):
    experts.down_proj = nn.Parameter(TwoTensor(*[experts.down_proj.data] * 2))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (with_norm, "the experts have a norm after their second linear"),
        (with_scale, r"parameters beside their two linears \(scale\)"),
        (of_integers, "'down_proj' is Parameter of torch.int8"),
        (of_wrappers, "a weight is TwoTensor, which has no memory of its own"),
        (nn.Module.double, "tensor cores take float32, bfloat16 and float16, not torch.float64"),
    ],
)
def test_the_triton_programs_never_hand_on(change, reason, monkeypatch):
    monkeypatch.setattr(ffn, "is_usable", lambda: (True, ""))
    monkeypatch.setattr(ffn, "is_interpreted", lambda: True)
    experts = make(CASES["top_2"])
    assert explain_ffn_experts(experts, implementation="peft_moe_triton") == (
        "peft_moe_triton: Triton programs, with 'silu' inside"
    )
    change(experts)
    with pytest.raises(RuntimeError, match=f"cannot compute Own: .*{reason}. Use model.set_experts"):
        ffn_triton_forward(experts, *inputs(CASES["top_2"]))
    assert "cannot run" in explain_ffn_experts(experts, implementation="peft_moe_triton")


@pytest.mark.parametrize(
    ("is_interpreted", "device", "where"),
    [(False, "cpu", "CUDA, but these are on 'cpu'"), (True, "cuda", "the CPU, where Triton's interpreter runs")],
)
def test_the_triton_programs_run_where_triton_does(is_interpreted, device, where, monkeypatch):
    monkeypatch.setattr(ffn, "is_usable", lambda: (True, ""))
    monkeypatch.setattr(ffn, "is_interpreted", lambda: is_interpreted)
    assert where in explain_ffn_experts(make(CASES["top_2"]), device, implementation="peft_moe_triton")


def test_the_name_is_known_to_transformers_and_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(ffn, "is_usable", lambda: (False, "there is no CUDA device"))
    model = MIXTRAL()
    model.set_experts_implementation("peft_moe_triton")
    with pytest.raises(RuntimeError, match="'peft_moe_triton' cannot compute MixtralExperts: there is no CUDA"):
        model(torch.arange(8).view(1, 8))
