"""`experts_implementation="peft_moe"` hands on to transformers, `"peft_moe_triton"` never does."""

from __future__ import annotations

import pytest
import torch
from packaging.version import Version
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation

from peft_moe.kernels import explain_ffn_experts, ffn
from peft_moe.kernels.ffn import ffn_experts_forward, ffn_triton_forward
from peft_moe.models.moe_llava.experts import EXPERTS_CLASSES
from tiny_moe import FAMILIES


NUM_EXPERTS, WIDTH, INNER = 5, 8, 16


class Settings:
    _experts_implementation = "peft_moe"


@use_experts_implementation(is_transposed=True, has_bias=True)
class TransposedExperts(nn.Module):
    """Laid out and gated as those of gpt-oss: transposed, with biases, gate and up interleaved."""

    def __init__(self, config):
        super().__init__()
        self.num_experts = NUM_EXPERTS
        self.gate_up_proj = nn.Parameter(torch.randn(NUM_EXPERTS, WIDTH, 2 * INNER) * 0.3)
        self.gate_up_proj_bias = nn.Parameter(torch.randn(NUM_EXPERTS, 2 * INNER))
        self.down_proj = nn.Parameter(torch.randn(NUM_EXPERTS, INNER, WIDTH) * 0.3)
        self.down_proj_bias = nn.Parameter(torch.randn(NUM_EXPERTS, WIDTH))

    def _apply_gate(self, gate_up):
        gate, up = gate_up[..., ::2], gate_up[..., 1::2]
        return (up.clamp(-1, 1) + 1) * gate * torch.sigmoid(1.7 * gate)

    def forward(self, hidden_states, top_k_index, top_k_weights):
        raise NotImplementedError


def stacked(has_gate: bool, has_bias: bool) -> nn.Module:
    torch.manual_seed(0)
    experts = EXPERTS_CLASSES[has_gate, has_bias](Settings(), NUM_EXPERTS, WIDTH, INNER, ACT2FN["gelu"])
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.5)
    return experts


def make(kind: str) -> nn.Module:
    if kind == "transposed":
        torch.manual_seed(0)
        return TransposedExperts(Settings())
    return stacked("gated" in kind, "bias" in kind)


KINDS = ["gated", "gated-bias", "plain", "plain-bias", "transposed"]


def inputs(num_tokens: int = 24, top_k: int = 2, *, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """Expert 3 gets nothing."""
    generator = torch.Generator().manual_seed(1)
    allowed = torch.tensor([0, 1, 2, 4])
    index = torch.stack([allowed[torch.randperm(4, generator=generator)[:top_k]] for _ in range(num_tokens)])
    x = torch.randn(num_tokens, WIDTH, generator=generator).to(dtype)
    return x, index, torch.rand(num_tokens, top_k, generator=generator)


def oracle(experts: nn.Module, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Token by token, slot by slot; an index of E contributes nothing."""
    up_name = "gate_up_proj" if experts.has_gate else "up_proj"
    out = []
    for token in range(x.shape[0]):
        total = torch.zeros_like(x[token])
        for slot in range(index.shape[1]):
            e = int(index[token, slot])
            if e == experts.num_experts:
                continue
            up, down = getattr(experts, up_name)[e], experts.down_proj[e]
            up, down = (up.T, down.T) if experts.is_transposed else (up, down)
            inner = up @ x[token] + (getattr(experts, f"{up_name}_bias")[e] if experts.has_bias else 0)
            hidden = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
            total = total + weights[token, slot] * (
                down @ hidden + (experts.down_proj_bias[e] if experts.has_bias else 0)
            )
        out.append(total)
    return torch.stack(out)


def with_gradients(function, experts, x, index, weights):
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    out = function(experts, x, index, weights)
    cotangent = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    grads = torch.autograd.grad(out, [x, weights, *experts.parameters()], cotangent)
    return [out.detach(), *grads]


def expected(kind: str, x, index, weights):
    return with_gradients(oracle, make(kind).double(), x.double(), index, weights.double())


def assert_close(found, wanted, tolerance):
    for ours, theirs in zip(found, wanted, strict=True):
        scale = theirs.abs().max().clamp(min=1e-6)
        assert ((ours.double() - theirs).abs().max() / scale) < tolerance


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_those_of_the_loop_over_tokens(kind, top_k):
    x, index, weights = inputs(top_k=top_k)
    found = with_gradients(ffn_experts_forward, make(kind), x, index, weights)
    assert_close(found, expected(kind, x, index, weights), 1e-5)


def errors(found, wanted):
    return [float((a.double() - b).abs().max() / b.abs().max().clamp(min=1e-6)) for a, b in zip(found, wanted)]


def test_experts_of_other_processes_contribute_nothing():
    x, index, weights = inputs()
    index[::3, 0] = NUM_EXPERTS
    experts = make("gated-bias")
    experts._is_expert_parallel = True
    found = with_gradients(ffn_experts_forward, experts, x, index, weights)
    assert_close(found, expected("gated-bias", x, index, weights), 1e-5)


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


def mixtral(**settings) -> MixtralForCausalLM:
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            **settings,
        )
    ).eval()


def test_from_pretrained_takes_the_name_and_generates(tmp_path):
    mixtral().save_pretrained(tmp_path)
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
        model = get_peft_model(mixtral(), config)
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
    model = mixtral()
    model.set_experts_implementation("peft_moe")
    tokens = torch.arange(8).view(1, 8)
    with torch.no_grad():
        wanted = model(tokens).logits
        found = torch.compile(model, fullgraph=True, backend="aot_eager")(tokens).logits
    assert torch.allclose(found, wanted, atol=1e-5)


def test_sizes_that_grouped_mm_refuses_compile_too():
    torch._dynamo.reset()
    torch.manual_seed(0)
    experts = EXPERTS_CLASSES[True, False](Settings(), 3, 10, 7, ACT2FN["silu"]).requires_grad_(False)
    experts.reset_parameters(0.5)
    x, weights, index = torch.randn(6, 10), torch.rand(6, 2), torch.tensor([[0, 2]] * 6)
    found = torch.compile(experts, fullgraph=True, backend="aot_eager")(x, index, weights)
    torch.testing.assert_close(found, oracle(experts, x, index, weights))
    assert explain_ffn_experts(experts, "cuda").startswith("batched_mm: ")


def test_explanations():
    experts = make("gated")
    assert explain_ffn_experts(experts) == "grouped_mm: dtype and widths are for it"
    assert explain_ffn_experts(experts.double()) == "batched_mm: grouped_mm does not take float64"


def test_float64_is_computed_too():
    x, index, weights = inputs(dtype=torch.float64)
    found = with_gradients(ffn_experts_forward, make("gated").double(), x, index, weights.double())
    assert_close(found, expected("gated", x, index, weights), 1e-12)


def test_only_names_of_this_package_are_explained():
    with pytest.raises(ValueError, match="'peft_moe' and 'peft_moe_triton', but got implementation='grouped_mm'"):
        explain_ffn_experts(make("gated"), implementation="grouped_mm")


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
    experts = make("gated")
    assert explain_ffn_experts(experts, implementation="peft_moe_triton") == (
        "peft_moe_triton: Triton programs, with 'gelu' inside"
    )
    change(experts)
    with pytest.raises(RuntimeError, match=f"cannot compute MoeLlavaGatedExperts: .*{reason}. Use model.set_experts"):
        ffn_triton_forward(experts, *inputs())
    assert "cannot run" in explain_ffn_experts(experts, implementation="peft_moe_triton")


@pytest.mark.parametrize(
    ("is_interpreted", "device", "where"),
    [(False, "cpu", "CUDA, but these are on 'cpu'"), (True, "cuda", "the CPU, where Triton's interpreter runs")],
)
def test_the_triton_programs_run_where_triton_does(is_interpreted, device, where, monkeypatch):
    monkeypatch.setattr(ffn, "is_usable", lambda: (True, ""))
    monkeypatch.setattr(ffn, "is_interpreted", lambda: is_interpreted)
    assert where in explain_ffn_experts(make("gated"), device, implementation="peft_moe_triton")


def test_the_name_is_known_to_transformers_and_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(ffn, "is_usable", lambda: (False, "there is no CUDA device"))
    model = mixtral()
    model.set_experts_implementation("peft_moe_triton")
    with pytest.raises(RuntimeError, match="'peft_moe_triton' cannot compute MixtralExperts: there is no CUDA"):
        model(torch.arange(8).view(1, 8))
