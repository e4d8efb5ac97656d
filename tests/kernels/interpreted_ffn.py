"""Run by `test_triton_interpreter.py` in a process whose Triton interprets: the programs for FFN experts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from ffn_cases import (
    CASES,
    FfnCase,
    Settings,
    cotangent_of,
    expected,
    inputs,
    make,
    oracle,
    relative,
    with_gradients,
)
from interpreted import LIMITS, changed
from packaging.version import Version
from torch import nn
from transformers import GptOssConfig, MixtralConfig, OlmoeConfig
from transformers.activations import ACT2FN
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

from peft_moe.kernels import explain_ffn_experts, ffn
from peft_moe.kernels.ffn import ACTIVATIONS, ffn_op, ffn_triton_forward
from peft_moe.kernels.triton import launch_ffn as launch
from peft_moe.kernels.triton.rows import order_of
from peft_moe.kernels.triton.tiles import Tiles
from peft_moe.models.moe_llava.experts import EXPERTS_CLASSES
from tiny_moe import FAMILIES


WIDE = FfnCase("more than a tile of narrow dtypes each way", 140, 72, 136, num_experts=1, top_k=1, has_bias=True)
HALF = {"wide": WIDE} | {name: CASES[name] for name in ("top_2", "transposed", "own_gate")}


def first_of(*names, count: int = 1):
    """The first ones in `make test`, all of them in `make test-all`."""
    further = [name if isinstance(name, tuple) else (name,) for name in names[count:]]
    return [*names[:count], *(pytest.param(*values, marks=pytest.mark.exhaustive) for values in further)]


def worst_error(case: FfnCase, dtype: torch.dtype = torch.float32) -> float:
    found = with_gradients(ffn_triton_forward, make(case, dtype), *inputs(case, dtype))
    return relative(found, expected(case, dtype))


OFTEN = [name for name in CASES if name not in ("top_1", "same_expert_twice", "plain", "other_experts_own_gate")]


@pytest.mark.parametrize("name", first_of(*OFTEN, *sorted(CASES.keys() - OFTEN), count=len(OFTEN)))
def test_float32(name, poison):
    assert worst_error(CASES[name]) <= 1e-5


@pytest.mark.parametrize("name", first_of(*HALF))
@pytest.mark.parametrize(("dtype", "limit"), first_of(*LIMITS[:0:-1]))
def test_half_precision(name, dtype, limit, poison):
    assert worst_error(HALF[name], dtype) <= limit


@pytest.mark.parametrize("activation", first_of("gelu", "gelu_new", "relu2", "silu", "quick_gelu", "relu", count=3))
def test_activations(activation, poison):
    case = replace(CASES["plain"], activation=activation, num_tokens=9)
    assert ffn.known_activation(make(case)) is not None
    assert worst_error(case) <= 1e-5


def test_every_known_activation_is_what_transformers_computes():
    formulas = {
        "silu": nn.functional.silu,
        "gelu": nn.functional.gelu,
        "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
        "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
        "relu": torch.relu,
        "relu2": lambda x: torch.relu(x).square(),
    }
    experts, x = make(CASES["plain"]), torch.linspace(-6, 6, 1001, dtype=torch.float64)
    found = {}
    for name in ACT2FN:
        experts.act_fn = ACT2FN[name]
        found[name] = ffn.known_activation(experts)
        if found[name] is not None:
            torch.testing.assert_close(experts.act_fn(x), formulas[found[name]](x))
    assert found.items() >= ACTIVATIONS.items() and not any(found[name] for name in ("gelu_10", "mish", "tanh"))


def test_activations_of_torch_are_known_too():
    experts = make(CASES["plain"])
    known = {nn.SiLU(): "silu", nn.ReLU(): "relu", nn.GELU(): "gelu", nn.GELU("tanh"): "gelu_tanh", nn.Mish(): None}
    for experts.act_fn, name in known.items():
        assert ffn.known_activation(experts) == name


@pytest.mark.parametrize("register", [nn.Module.register_forward_hook, nn.Module.register_full_backward_hook])
def test_hooks_of_the_activation_are_called(register, poison):
    experts, seen = make(CASES["top_2"]), []
    register(experts.act_fn, lambda *call: seen.append(1))
    found = with_gradients(ffn_triton_forward, experts, *inputs(CASES["top_2"]))
    assert seen and relative(found, expected(CASES["top_2"], torch.float32)) <= 1e-5


def test_a_replaced_forward_of_the_activation_is_called():
    experts = make(CASES["top_2"])
    experts.act_fn.forward = torch.zeros_like
    assert not ffn_triton_forward(experts, *inputs(CASES["top_2"])).any()


@pytest.mark.parametrize("activation", ["relu", "relu2"])
def test_values_that_overflow_below_zero_are_cut_off(activation, poison):
    case = replace(CASES["plain"], activation=activation, num_tokens=9)
    experts, (x, index, weights) = make(case, torch.float16), inputs(case, torch.float16)
    with torch.no_grad():
        experts.up_proj.fill_(-6e4)
    found = with_gradients(ffn_triton_forward, experts, x.abs() + 1, index, weights)
    assert not any(tensor.any() for tensor in found)


def test_an_index_that_is_changed_before_backward_is_noticed():
    x, index, weights = inputs(CASES["top_2"])
    index = index.contiguous()
    out = ffn_triton_forward(make(CASES["top_2"]), x, index, weights).sum()
    index.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


@pytest.mark.parametrize("name", first_of("top_2", "several_tiles", "own_gate"))
def test_repeats_are_equal_to_the_bit(name):
    runs = [with_gradients(ffn_triton_forward, make(CASES[name]), *inputs(CASES[name])) for _ in range(2)]
    assert all(torch.equal(first, second) for first, second in zip(*runs))


def test_views_as_inputs_and_an_expanded_gradient(poison):
    case = CASES["top_2"]
    x, index, weights = inputs(case)
    experts = make(case)
    views = [x.t().contiguous().t(), index.t().contiguous().t(), weights.t().contiguous().t()]
    assert not any(view.is_contiguous() for view in views)
    found = []
    for given in ((x, index, weights), views):
        leaf = given[0].requires_grad_()
        found.append(
            torch.autograd.grad(ffn_triton_forward(experts, leaf, *given[1:]).sum(), [leaf, experts.down_proj])
        )
    torch.testing.assert_close(*found)


def test_autocast_reads_wide_weights_where_they_lie(monkeypatch, poison):
    case = CASES["transposed"]
    experts, cast, to = make(case), [], torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *a, **k: cast.append(tensor.dim()) or to(tensor, *a, **k))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = with_gradients(ffn_triton_forward, experts, *inputs(case))
    assert cast and 3 not in cast
    assert all(tensor.dtype == torch.float32 for tensor in found)
    assert 1e-4 < relative(found, expected(case, torch.float32)) <= 1.5e-2


def test_experts_of_two_dtypes_are_computed_in_the_wider_one(poison):
    case = CASES["top_2"]
    x, index, weights = inputs(case)
    experts = make(case)
    experts.gate_up_proj.data = experts.gate_up_proj.data.bfloat16()
    found = with_gradients(ffn_triton_forward, experts, x, index, weights)
    assert [tensor.dtype for tensor in found[3:]] == [torch.bfloat16, torch.float32]
    wanted = with_gradients(oracle, experts.double(), x.double(), index, weights.double())
    assert relative(found[:3] + found[4:], wanted[:3] + wanted[4:]) <= 1e-5
    assert relative(found[3:4], wanted[3:4]) <= 3e-3


LAUNCHES = {
    "x": ["row_product", "activation_gradient", "row_product"],
    "weights": ["row_product", "activation_gradient"],
    "gate_up_proj": ["row_product", "activation_gradient", "stack_gradient"],
    "gate_up_proj_bias": ["row_product", "activation_gradient", "bias_gradient"],
    "down_proj": ["activation_gradient", "stack_gradient"],
    "down_proj_bias": ["bias_gradient"],
}


@pytest.mark.parametrize("name", first_of("transposed", "own_gate"))
@pytest.mark.parametrize("wanted", LAUNCHES)
def test_gradients_that_nobody_wants_cost_nothing(wanted, name, monkeypatch, poison):
    case = CASES[name]
    experts, (x, index, weights) = make(case).requires_grad_(False), inputs(case)
    leaves = {"x": x, "weights": weights, **dict(experts.named_parameters())}
    leaves[wanted].requires_grad_()
    out = ffn_triton_forward(experts, x, index, weights)
    launched = []
    for step in {step for steps in LAUNCHES.values() for step in steps}:
        run = getattr(launch, f"run_{step}")
        note = lambda *a, step=step, run=run, **k: launched.append(step) or run(*a, **k)  # noqa: E731
        monkeypatch.setattr(launch, f"run_{step}", note)
    (found,) = torch.autograd.grad(out, leaves[wanted], cotangent_of(out))
    position = list(leaves).index(wanted)
    assert relative([found], expected(case, torch.float32)[1 + position : 2 + position]) <= 1e-5
    by_program = [step for step in LAUNCHES[wanted] if step != "activation_gradient" or not case.has_own_gate]
    assert launched == by_program


def test_nothing_is_kept_without_gradients(monkeypatch):
    case = CASES["top_2"]
    kept = []
    run = launch.run_first_linear
    monkeypatch.setattr(launch, "run_first_linear", lambda *given: kept.append(given[-1]) or run(*given))
    with torch.no_grad():
        ffn_triton_forward(make(case), *inputs(case))
    ffn_triton_forward(make(case).requires_grad_(False), *inputs(case))
    ffn_triton_forward(make(case), *inputs(case))
    assert kept == [False, False, True]


def test_second_derivative_is_refused():
    x, index, weights = inputs(CASES["top_2"])
    out = ffn_triton_forward(make(CASES["top_2"]), x.requires_grad_(), index, weights)
    with pytest.raises(RuntimeError, match="'peft_moe_triton' experts have no second derivative"):
        torch.autograd.grad(out.square().sum(), x, create_graph=True)


SIZES = {"hidden_size": 24, "intermediate_size": 16}
MODULES = {
    "mixtral": lambda: MixtralExperts(MixtralConfig(**SIZES, num_local_experts=4, hidden_act="silu")),
    "gpt_oss": lambda: GptOssExperts(GptOssConfig(**SIZES, num_local_experts=4)),
    "moe_llava_plain": lambda: EXPERTS_CLASSES[False, True](Settings(), 4, 24, 16, ACT2FN["gelu_new"]),
    "moe_llava": lambda: EXPERTS_CLASSES[True, False](Settings(), 4, 24, 16, ACT2FN["silu"]),
    "olmoe": lambda: OlmoeExperts(OlmoeConfig(**SIZES, num_experts=4)),
}


def with_implementation(experts, name: str):
    def run(experts, *given):
        experts.config._experts_implementation = name
        return experts(*given)

    return run


@pytest.mark.parametrize("name", first_of(*MODULES, count=3))
def test_modules_of_transformers_and_of_moe_llava(name, poison):
    torch.manual_seed(0)
    experts = MODULES[name]()
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.3)
    given = inputs(CASES["top_2"])
    wanted, found = (
        with_gradients(with_implementation(experts, implementation), experts, *given)
        for implementation in ("eager", "peft_moe_triton")
    )
    assert relative(found, [tensor.double() for tensor in wanted]) <= 1e-5
    has_own_gate = "by torch" in explain_ffn_experts(experts, "cpu", implementation="peft_moe_triton")
    assert has_own_gate == (name == "gpt_oss")


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_whole_models_of_every_family(family):
    model = family.build().requires_grad_(True)
    tokens = torch.arange(3, 35).view(2, 16)
    found = []
    for implementation in ("eager", "peft_moe_triton"):
        model.set_experts_implementation(implementation)
        model.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        found.append([p.grad.clone() for n, p in model.named_parameters() if ".experts." in n and p.grad is not None])
    assert found[0] and relative(*found[::-1]) <= 1e-4


@pytest.mark.parametrize("name", first_of("transposed", "top_2", "plain", "other_experts"))
def test_compiled_graphs_hold_the_op_and_its_gradients(name):
    torch._dynamo.reset()
    case = CASES[name]
    experts = make(case)
    experts.config._experts_implementation = "peft_moe_triton"
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    found, wanted = (
        with_gradients(lambda _, *given, run=run: run(*given), experts, *inputs(case)) for run in (compiled, experts)
    )
    torch.testing.assert_close(found, wanted)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs(case)), wanted[0])


@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.9"), reason="older compilers keep the message to themselves"
)
def test_a_compiled_graph_cannot_hold_an_activation_of_its_own():
    torch._dynamo.reset()
    experts = make(CASES["own_gate"])
    experts.config._experts_implementation = "peft_moe_triton"
    with pytest.raises(Exception, match="only activations that the programs know"):
        torch.compile(experts, fullgraph=True, backend="aot_eager")(*inputs(CASES["own_gate"]))


@pytest.mark.exhaustive
@pytest.mark.parametrize("keeps_inner", [True, False])
def test_the_op_obeys_the_rules_of_torch_library(keeps_inner):
    case = CASES["transposed"]
    experts, (x, index, weights) = make(case), inputs(case)
    linears, _ = ffn.linears_of(experts, x.device)
    leaves = [x.requires_grad_(keeps_inner), weights.requires_grad_(keeps_inner), *linears]
    given = leaves if keeps_inner else [leaf.detach() for leaf in leaves]
    torch.library.opcheck(
        ffn_op,
        (*given, *order_of(index, case.num_experts), "silu", True, keeps_inner),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


CHANGES = {
    "the weight of another slot": ("total *= tl.load(weight + pair,", "total *= tl.load(weight + pair // K * K,"),
    "no weight in the gradient of the second linear": ("narrow(hidden * scale", "narrow(hidden * 1.0"),
    "segments end a row early": ("is_row = rows < stop", "is_row = rows < stop - 1"),
    "sums end a row early": ("is_inside = inside < stop", "is_inside = inside < stop - 1"),
    "the halves of the gate exchanged": ("total, rest = products(", "rest, total = products("),
    "no bias": ("total += tl.load(bias + expert * U", "total += 0 * tl.load(bias + expert * U"),
    "half of the slope": ("slope = factor + x * growth", "slope = factor"),
    "rows in the place of pairs": ("target = rows if GATHERS else pair", "target = rows"),
    "the token of a neighbour": ("other=0) // K", "other=0) // K ^ 1"),
    "no weight in the gradient of the first linear": ("grad *= scale", "grad *= 1.0"),
    "no weight in the gradient of a bias": ("values *= tl.load(weight", "values *= 1 + 0 * tl.load(weight"),
    "always the first expert": ("w + expert.to(tl.int64) * stride_we", "w + 0 * expert.to(tl.int64) * stride_we"),
    "the gate for its other half in backward": ("inner + of_inner + F + column", "inner + of_inner + column"),
    "the wrong half of the bias": ("bias + expert * U + F + column", "bias + expert * U + column"),
    "no bias of the second linear": ("total += tl.load(bias + expert * W", "total += 0 * tl.load(bias + expert * W"),
    "the rest of the depth": ("range(0, D, BLOCK_D)", "range(0, D - BLOCK_D, BLOCK_D)"),
    "only the last columns of a dot product": ("total += grad * hidden", "total = grad * hidden"),
    "the gradients of an expert in another's place": ("where = expert.to(tl.int64) * stride_oe", "where = stride_oe"),
    "a slot for a token": ("source = pair // K if GATHERS else inside", "source = pair % K if GATHERS else inside"),
}
SHOWS = FfnCase("two steps along each width", 12, 40, 40, num_experts=2, has_bias=True)


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(launch, "ACTIVATION_TILES", Tiles(4, 16, 4, 3))
    monkeypatch.setattr(launch, "BIAS_TILES", Tiles(4, 16, 4, 3))


def test_the_unchanged_programs_are_right(small_tiles):
    assert worst_error(SHOWS) <= 1e-5


@pytest.mark.parametrize("name", first_of(*CHANGES, count=6))
def test_a_wrong_program_is_noticed(name, tmp_path, monkeypatch, small_tiles):
    monkeypatch.setattr(launch, "programs", changed(launch.programs, *CHANGES[name], tmp_path))
    assert not worst_error(SHOWS) <= 1e-2
