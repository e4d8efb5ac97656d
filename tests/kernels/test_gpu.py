"""Every backend on a CUDA device: like the oracle, the same in every run, inside a CUDA graph, within memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import pytest
import torch
from ffn_cases import CASES as FFN_CASES
from ffn_cases import FfnCase, expected, loop_over_experts, relative, with_gradients
from ffn_cases import inputs as ffn_inputs
from ffn_cases import make as make_experts
from kernel_cases import CASES, KernelCase, make_grad_out, make_index, make_inputs, plan_of
from kernel_oracle import outputs_and_gradients
from test_conformance import LIMITS, gradients, relative_error
from test_conformance import skip_unless_supported as skip_on

from peft_moe.kernels import BACKENDS, DispatchPlan, lora_experts
from peft_moe.kernels.ffn import ffn_triton_forward
from peft_moe.kernels.triton.paths import path_of


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

DEVICE = "cuda"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LARGE = {
    "llama_7b": KernelCase("a linear of a 7B model", 2048, 4096, 4096, num_experts=8, rank=16, top_k=2),
    "fine_grained": KernelCase("many experts", 2048, 2048, 1024, num_experts=64, rank=32, top_k=2),
    "skewed": KernelCase("one expert has nearly all", 4096, 1024, 1024, rank=64, top_k=1, forced=[[2]] * 4095 + [[0]]),
    "wide_rank": KernelCase("a rank above the widest tile", 1024, 1024, 1024, rank=160, top_k=2),
    "decode": KernelCase("a few tokens", 7, 4096, 11008, num_experts=8, rank=16, top_k=2),
    "one_token": KernelCase("decoding alone", 1, 4096, 4096, num_experts=8, rank=64, top_k=2),
    "examples": KernelCase(
        "a universal expert", 3000, 2048, 1024, 5, 16, 2, [[0, 4], [2, 4], [0, 4]], tokens_per_example=1000
    ),
    "split_examples": KernelCase(
        "sums that are split", 8192, 1024, 1024, 5, 8, 2, [[0, 4], [3, 4]] * 4, tokens_per_example=1024
    ),
}


def on_device(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().to(DEVICE).requires_grad_() for name, tensor in tensors.items()}


skip_unless_supported = partial(skip_on, device=DEVICE)


def run(backend: str, case: KernelCase, inputs: dict[str, torch.Tensor], grad_out: torch.Tensor) -> dict:
    device = inputs["A"].device
    out = lora_experts(**inputs, plan=plan_of(case, device), scaling=case.scaling, backend=backend)
    return {"out": out, **gradients(out, inputs, grad_out.to(device))}


def replayed(layer: Callable[[], torch.Tensor], change: Callable[[], object]) -> torch.Tensor:
    """What a CUDA graph of `layer` leaves in its output after a change of its inputs."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            layer()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer()
    change()
    graph.replay()
    torch.cuda.synchronize()
    return captured


def launches_of(layer: Callable[[], object]) -> list[str]:
    """What the second call of `layer` starts on the device; the first one compiles."""
    layer()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        layer()
        torch.cuda.synchronize()
    return [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]


def peak_bytes(call: Callable[[], object]) -> int:
    """The peak of memory above what is there when `call` begins."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.is_dispatched])
def test_agrees_with_the_oracle(backend, dtype, name):
    case = CASES[name]
    skip_unless_supported(backend, case, dtype)
    inputs, grad_out = make_inputs(case, dtype), make_grad_out(case, dtype)
    expected = outputs_and_gradients(case, inputs, grad_out)
    found = run(backend, case, on_device(inputs), grad_out)
    errors = {key: relative_error(found[key].detach().cpu(), expected[key]) for key in expected}
    assert max(errors.values()) <= LIMITS[dtype], errors


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "eager"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LARGE)
def test_large_shapes_agree_with_the_definition(backend, dtype, name):
    case = LARGE[name]
    skip_unless_supported(backend, case, dtype)
    if backend in ("gather", "pair_loop") and case.num_tokens > 64:
        pytest.skip("it copies weights for each token and is for few of them")
    inputs, grad_out = on_device(make_inputs(case, dtype)), make_grad_out(case, dtype)
    exact = {key: tensor.detach().double().requires_grad_() for key, tensor in inputs.items()}
    expected = run("eager", case, exact, grad_out.double())
    found = run(backend, case, inputs, grad_out)
    errors = {key: relative_error(found[key].detach(), expected[key].detach()) for key in expected}
    assert max(errors.values()) <= LIMITS[dtype], errors


@pytest.mark.parametrize("backend", ["triton", "dense", "grouped_mm"])
@pytest.mark.parametrize("name", ["llama_7b", "fine_grained", "decode", "split_examples"])
def test_a_hundred_runs_are_equal_to_the_bit(backend, name):
    case = LARGE[name]
    skip_unless_supported(backend, case, torch.bfloat16)
    inputs, grad_out = on_device(make_inputs(case, torch.bfloat16)), make_grad_out(case, torch.bfloat16)
    first = run(backend, case, inputs, grad_out)
    for _ in range(99):
        again = run(backend, case, inputs, grad_out)
        assert all(torch.equal(again[key], first[key]) for key in first)


@pytest.mark.parametrize("backend", ["triton", "dense"])
@pytest.mark.parametrize("name", ["llama_7b", "fine_grained", "decode", "examples"])
def test_a_cuda_graph_replays_another_routing(backend, name):
    case = LARGE[name]
    skip_unless_supported(backend, case, torch.bfloat16)
    inputs = {key: tensor.detach() for key, tensor in on_device(make_inputs(case, torch.bfloat16)).items()}
    index = make_index(case).to(DEVICE)

    def layer() -> torch.Tensor:
        plan = DispatchPlan.from_index(index, case.num_experts, tokens_per_example=case.tokens_per_example)
        return lora_experts(**inputs, plan=plan, scaling=case.scaling, backend=backend)

    found = replayed(layer, lambda: index.copy_((index + 1) % case.num_experts))
    torch.testing.assert_close(found, layer(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "launches"), [("decode", 2), ("one_token", 2), ("examples", 2), ("llama_7b", 2), ("fine_grained", 4)]
)
def test_triton_forward_takes_few_launches(name, launches):
    """Shrink and expand; where tokens are sorted, also the sort and an expand for each slot."""
    case = LARGE[name]
    skip_unless_supported("triton", case, torch.bfloat16)
    inputs = {key: tensor.detach() for key, tensor in on_device(make_inputs(case, torch.bfloat16)).items()}
    index = make_index(case).to(DEVICE)

    def layer() -> None:
        plan = DispatchPlan.from_index(index, case.num_experts, tokens_per_example=case.tokens_per_example)
        lora_experts(**inputs, plan=plan, scaling=case.scaling, backend="triton")

    launched = launches_of(layer)
    assert len(launched) == launches, launched


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is no second CUDA device")
@pytest.mark.parametrize("name", ["one_token", "hundred_tokens", "by_example"])
def test_tensors_on_the_second_device(name):
    """Triton programs start on the device of their tensors, which need not be the current one."""
    case, second = CASES[name], {}
    for key, tensor in make_inputs(case, torch.float32).items():
        second[key] = tensor.detach().to("cuda:1").requires_grad_()
    grad_out = torch.ones(case.num_tokens, case.out_features)
    assert torch.cuda.current_device() == 0
    found, wanted = (run(backend, case, second, grad_out) for backend in ("triton", "eager"))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_the_sort_is_that_of_torch():
    skip_unless_supported("triton", CASES["top_2"], torch.float32)
    from peft_moe.kernels.triton.rows import run_sort

    for tokens, num_experts, top_k in [(1, 1, 1), (300, 5, 2), (5000, 8, 2), (32768, 64, 2), (32768, 256, 4)]:
        generator = torch.Generator(DEVICE).manual_seed(0)
        index = torch.randint(num_experts, (tokens, top_k), generator=generator, device=DEVICE)
        token_of_row, segment_end = run_sort(index, 1, num_experts)
        segment = (index + num_experts * torch.arange(top_k, device=DEVICE)).t().reshape(-1)
        assert torch.equal(token_of_row.long(), segment.argsort(stable=True) % tokens)
        assert torch.equal(segment_end.long(), segment.bincount(minlength=num_experts * top_k).cumsum(0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_transposed_weights(backend):
    """On some builds torch multiplies a transposed view of bfloat16 wrongly (pytorch#186365)."""
    case = dataclasses.replace(CASES["hundred_tokens"], in_features=64, out_features=128, rank=16)
    skip_unless_supported(backend, case, torch.bfloat16)
    inputs, grad_out = on_device(make_inputs(case, torch.bfloat16)), make_grad_out(case, torch.bfloat16)
    views = {
        key: tensor.detach().mT.contiguous().mT.requires_grad_() if tensor.dim() == 3 else tensor
        for key, tensor in inputs.items()
    }
    assert not views["A"].is_contiguous()
    found, expected = run(backend, case, views, grad_out), run(backend, case, inputs, grad_out)
    assert all(relative_error(found[key].detach(), expected[key].detach().double()) <= 1e-2 for key in expected)


@pytest.mark.parametrize("num_experts", [8, 32])
def test_triton_needs_no_buffer_of_the_size_of_all_rows(num_experts):
    case = dataclasses.replace(LARGE["llama_7b"], num_tokens=8192, num_experts=num_experts)
    skip_unless_supported("triton", case, torch.bfloat16)
    inputs, grad_out = on_device(make_inputs(case, torch.bfloat16)), make_grad_out(case, torch.bfloat16).to(DEVICE)
    plan = plan_of(case, DEVICE)

    def step() -> torch.Tensor:
        return lora_experts(**inputs, plan=plan, scaling=case.scaling, backend="triton")

    step()  # compiles
    peak = peak_bytes(lambda: torch.autograd.grad(step(), list(inputs.values()), grad_out))
    tokens, rows = case.num_tokens, case.num_tokens * case.top_k
    outputs = tokens * (case.in_features + 2 * case.out_features) * 2  # dx, the output, and the gradient of base_out
    weights = sum(inputs[name].numel() for name in ("A", "B")) * (2 + 4 * 4)  # gradients, and their split sums
    path = path_of(tokens, case.tokens_per_example, num_experts, case.top_k, case.rank)
    columns = tokens * num_experts if path == "dense" else rows
    small = columns * case.rank * 2 * 4 + rows * 64
    assert peak <= 1.1 * (outputs + weights + small)


LARGE_FFN = {
    "mixtral": FfnCase("wide experts", 2048, 2048, 5632, num_experts=8),
    "fine_grained": FfnCase("many narrow experts", 2048, 2048, 1024, num_experts=64, top_k=8),
    "gpt_oss": FfnCase(
        "torch computes the activation", 1024, 2880, 2880, 16, 4, has_bias=True, is_transposed=True, has_own_gate=True
    ),
    "plain": FfnCase("no gate", 2048, 2048, 4096, activation="gelu", has_gate=False, has_bias=True),
    "decode": FfnCase("a few tokens", 3, 4096, 14336, num_experts=8),
    "skewed": FfnCase("one expert has nearly all", 4096, 1024, 1024, top_k=1, forced=((2,),) * 4095 + ((0,),)),
    "other_experts": FfnCase(
        "most experts are elsewhere", 2048, 1024, 1024, forced=((4, 1), (4, 4), (3, 0), (4, 4)) * 512
    ),
}


def ffn_results(function, experts, *given) -> list[torch.Tensor]:
    """Output and gradients on the device."""
    return with_gradients(function, experts.to(DEVICE), *(tensor.to(DEVICE) for tensor in given))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FFN_CASES)
def test_ffn_experts_agree_with_the_oracle(name, dtype, poison):
    case = FFN_CASES[name]
    found = ffn_results(ffn_triton_forward, make_experts(case, dtype), *ffn_inputs(case, dtype))
    assert relative([tensor.cpu() for tensor in found], expected(case, dtype)) <= LIMITS[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LARGE_FFN)
def test_large_ffn_experts_agree_with_a_loop(name, dtype, poison):
    case = LARGE_FFN[name]
    experts, given = make_experts(case, dtype), ffn_inputs(case, dtype)
    found = ffn_results(ffn_triton_forward, experts, *given)
    exact = ffn_results(loop_over_experts, experts.double(), given[0].double(), given[1], given[2].double())
    assert relative(found, exact) <= LIMITS[dtype]


@pytest.mark.parametrize("name", ["top_2", "transposed", "own_gate"])
def test_ffn_experts_under_autocast(name, poison):
    case = FFN_CASES[name]
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        found = ffn_results(ffn_triton_forward, make_experts(case), *ffn_inputs(case))
    assert all(tensor.dtype == torch.float32 for tensor in found)
    assert 1e-4 < relative([tensor.cpu() for tensor in found], expected(case, torch.float32)) <= 1.5e-2


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "decode"])
def test_a_hundred_runs_of_ffn_experts_are_equal_to_the_bit(name):
    case = LARGE_FFN[name]
    experts, given = make_experts(case, torch.bfloat16), ffn_inputs(case, torch.bfloat16)
    first = ffn_results(ffn_triton_forward, experts, *given)
    for _ in range(99):
        assert all(map(torch.equal, ffn_results(ffn_triton_forward, experts, *given), first))


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "decode"])
def test_a_cuda_graph_of_ffn_experts_replays_another_routing(name):
    case = LARGE_FFN[name]
    experts = make_experts(case, torch.bfloat16).to(DEVICE).requires_grad_(False)
    x, index, weights = (tensor.to(DEVICE) for tensor in ffn_inputs(case, torch.bfloat16))
    layer = partial(ffn_triton_forward, experts, x, index, weights)
    found = replayed(layer, lambda: index.copy_((index + 1) % case.num_experts))
    torch.testing.assert_close(found, layer(), rtol=0, atol=0)


def test_ffn_experts_take_four_launches():
    """The sort, both linears, and the sum over the slots."""
    case = LARGE_FFN["mixtral"]
    experts = make_experts(case, torch.bfloat16).to(DEVICE).requires_grad_(False)
    given = [tensor.to(DEVICE) for tensor in ffn_inputs(case, torch.bfloat16)]
    given[1] = given[1].contiguous()
    launched = launches_of(lambda: ffn_triton_forward(experts, *given))
    assert len(launched) == 4, launched


def test_ffn_experts_copy_no_stack_of_weights():
    """Beside gradients: u and its gradient, h and its weighted copy, and a row for each pair."""
    case = LARGE_FFN["mixtral"]
    experts = make_experts(case, torch.bfloat16)
    given = [tensor.to(DEVICE) for tensor in ffn_inputs(case, torch.bfloat16)]
    ffn_results(ffn_triton_forward, experts, *given)  # compiles
    peak = peak_bytes(lambda: ffn_results(ffn_triton_forward, experts, *given))
    pairs = case.num_tokens * case.top_k
    rows = pairs * (2 * 2 * case.inner + 2 * case.inner + 2 * case.width) * 2
    tokens = 8 * case.num_tokens * case.width * 4
    assert peak <= 1.1 * (rows + tokens + sum(p.numel() for p in experts.parameters()) * 2)
