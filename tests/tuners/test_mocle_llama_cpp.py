"""llama.cpp, which knows nothing of MoCLE, generates what MoCLE does from exported clusters of SmolLM2."""

import json
import sys
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from peft_moe import MoCLEConfig
from peft_moe.tuners.mocle.export import export_all, export_cluster_lora
from tiny_models import tiny_llama


gguf = pytest.importorskip("gguf")
sys.path.append(str(Path(__file__).parents[2] / "examples" / "mocle"))
import to_gguf  # noqa: E402

from pretrained import smollm2_path  # noqa: E402


NUM_TOKENS = 32
PROMPT = "Write a short story about a dog."
# target_modules, and how wide B is drawn: enough to change the text, and it stays a text
TARGETS = {"default": (None, 0.06), "rotated_attention": (["q_proj", "k_proj", "v_proj", "o_proj"], 0.02)}


def write_base(folder: Path, output: Path) -> Path:
    """The base model as GGUF in float32, the tokenizer with it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = model.config
    writer = gguf.GGUFWriter(output, "llama")
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    kinds = [gguf.TokenType.CONTROL if index in special else gguf.TokenType.NORMAL for index in range(len(tokenizer))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
    writer.add_token_types(kinds)
    gguf.SpecialVocab(folder, load_merges=True).add_to_gguf(writer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for key, tensor in model.state_dict().items():
        module = key.removesuffix(".weight")
        if module != "lm_head":  # tied
            rows = to_gguf.for_rope(module, tensor, config)
            writer.add_tensor(f"{names.get_name(module)}.weight", rows.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return output


class LlamaCpp:
    """llama.cpp's own server in this process, asked over HTTP; all adapters are loaded, each request names its own."""

    def __init__(self, base: Path, adapters: list[Path]) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(base)
        params.n_ctx = 256
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        # flash attention and the default cache compute in float16
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(path), 1.0) for path in adapters]
        self.num_adapters = len(adapters)
        self.server = xllamacpp.Server(params)

    def generate(self, prompt: list[int], adapter: int | None) -> tuple[list[int], list[float]]:
        """Greedy tokens, and the log-probability of each."""
        scales = [{"id": index, "scale": float(index == adapter)} for index in range(self.num_adapters)]
        body = {
            "prompt": prompt,
            "n_predict": NUM_TOKENS,
            "temperature": 0.0,
            "n_probs": 1,
            "ignore_eos": False,
            "return_tokens": True,
            "lora": scales,
        }
        request = urllib.request.Request(
            f"{self.server.listening_address}/completion",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=300) as response:
            answer = json.load(response)
        return answer["tokens"], [entry["logprob"] for entry in answer["completion_probabilities"]]


@torch.no_grad()
def generate(model, prompt: list[int], **inputs) -> tuple[list[int], list[float]]:
    """What transformers generates: greedy tokens, and the log-probability of each."""
    output = model.generate(
        input_ids=torch.tensor([prompt]),
        max_new_tokens=NUM_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **inputs,
    )
    tokens = output.sequences[0, len(prompt) :]
    logprobs = torch.cat(output.logits).log_softmax(dim=-1)
    return tokens.tolist(), logprobs[torch.arange(len(tokens)), tokens].tolist()


@pytest.fixture(scope="module")
def base_gguf(tmp_path_factory):
    return write_base(smollm2_path(), tmp_path_factory.mktemp("llama_cpp") / "base.gguf")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("xllamacpp") is None, reason="llama.cpp is not installed: pip install xllamacpp")
@pytest.mark.parametrize(("targets", "std"), TARGETS.values(), ids=TARGETS)
def test_llama_cpp_generates_the_tokens_of_each_cluster(targets, std, base_gguf, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2_path())
    base = transformers.AutoModelForCausalLM.from_pretrained(smollm2_path(), dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    expected = {None: generate(base.eval(), prompt)}
    config = MoCLEConfig(num_clusters=2, num_experts=2, r=8, lora_alpha=16, target_modules=targets, temperature=0.5)
    model = get_peft_model(base, config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mocle_B" in name:
                parameter.normal_(std=std)
            if "mocle_embedding" in name:
                # the clusters prefer different experts, and the universal one keeps a share
                parameter.mul_(4)
    folders = export_all(model, tmp_path)
    for cluster in range(2):
        expected[cluster] = generate(model, prompt, cluster_ids=torch.tensor([cluster]))
    files = [to_gguf.convert(folder, base.config, tmp_path / f"{folder.name}.gguf") for folder in folders]
    server = LlamaCpp(base_gguf, files)
    for adapter, (tokens, logprobs) in expected.items():
        found_tokens, found_logprobs = server.generate(prompt, adapter)
        gap = (torch.tensor(found_logprobs) - torch.tensor(logprobs)).abs().max().item()
        print(
            f"{adapter}: {len(tokens)} tokens, log-probabilities differ by up to {gap:.1e}: "
            f"{tokenizer.decode(tokens)!r}"
        )
        assert found_tokens == tokens
        assert len(tokens) >= 24
        assert gap < 1e-3
    assert len({tuple(tokens) for tokens, _ in expected.values()}) == 3


def read(path: Path) -> dict[str, torch.Tensor]:
    return {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in gguf.GGUFReader(path).tensors}


def test_adapter_file_holds_what_llama_cpp_reads(tmp_path):
    model = get_peft_model(tiny_llama(), MoCLEConfig(num_clusters=2, r=4, cluster_embedding_dim=8))
    export_cluster_lora(model, 1, tmp_path / "adapter")
    path = to_gguf.convert(tmp_path / "adapter", tiny_llama().config, tmp_path / "adapter.gguf")
    fields = gguf.GGUFReader(path).fields
    found = {name: fields[name].contents() for name in fields if not name.startswith("GGUF")}
    assert found == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 8.0,
    }
    tensors = read(path)
    assert len(tensors) == 3 * 2 * 2
    assert tensors["blk.2.ffn_up.weight.lora_a"].shape == (8, 32)
    assert tensors["blk.2.ffn_up.weight.lora_b"].shape == (48, 8)


@pytest.mark.parametrize(
    "options",
    [{"use_rslora": True}, {"rank_pattern": {"down_proj": 2}}, {"alpha_pattern": {"up_proj": 3}}],
    ids=lambda options: next(iter(options)),
)
def test_every_scaling_of_peft_survives(options, tmp_path):
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["up_proj", "down_proj"], init_lora_weights=False, **options)
    model = get_peft_model(tiny_llama(), config)
    model.save_pretrained(tmp_path / "adapter")
    tensors = read(to_gguf.convert(tmp_path / "adapter", tiny_llama().config, tmp_path / "adapter.gguf"))
    for name, linear in (("ffn_up", "up_proj"), ("ffn_down", "down_proj")):
        A, B = (tensors[f"blk.1.{name}.weight.lora_{part}"] for part in "ab")
        expected = model.get_submodule(f"base_model.model.model.layers.1.mlp.{linear}").get_delta_weight("default")
        torch.testing.assert_close(6 / B.shape[1] * B @ A, expected)


def test_what_a_gguf_adapter_cannot_hold_is_refused(tmp_path):
    config = MoCLEConfig(num_clusters=2, r=4, cluster_embedding_dim=8, modules_to_save=["lm_head"])
    export_cluster_lora(get_peft_model(tiny_llama(), config), 0, tmp_path / "adapter")
    with pytest.raises(ValueError, match="1 tensors that are no LoRA, such as base_model.model.lm_head"):
        to_gguf.convert(tmp_path / "adapter", tiny_llama().config, tmp_path / "adapter.gguf")
    with pytest.raises(ValueError, match="base model is 'gpt2'"):
        to_gguf.convert(tmp_path / "adapter", transformers.GPT2Config(), tmp_path / "adapter.gguf")
