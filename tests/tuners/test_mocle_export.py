"""An exported cluster is MoCLE for that cluster: the same logits, in plain PEFT, and merged; and a text finds it."""

import copy
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from peft import AutoPeftModelForSequenceClassification, LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file

from peft_moe import (
    ClusterAdapterRouter,
    InstructionClusterer,
    MoCLEConfig,
    export_all,
    export_cluster_lora,
)
from peft_moe.tuners.mocle.encoder import SentenceEncoder
from pretrained import minilm_path
from tiny_models import tiny_llama, token_batch


NUM_CLUSTERS = 5
SETTINGS = {
    "num_clusters": NUM_CLUSTERS,
    "num_experts": 3,
    "r": 4,
    "cluster_embedding_dim": 8,
    "init_lora_weights": False,
    # soft gates, so that every weight counts
    "temperature": 0.5,
}
CONFIGS = {
    "top_1": MoCLEConfig(**SETTINGS),
    "top_2": MoCLEConfig(**SETTINGS, top_k=2),
    "all_experts": MoCLEConfig(**SETTINGS, top_k=3),
    "squared": MoCLEConfig(**SETTINGS, squared_gate=True),
    "no_universal": MoCLEConfig(**SETTINGS, universal_expert=False),
    "no_universal_top_2": MoCLEConfig(**SETTINGS, universal_expert=False, top_k=2),
    "released_code": MoCLEConfig.released_code(**SETTINGS),
    "rank_stabilised": MoCLEConfig(**SETTINGS, use_rslora=True),
    "rank_pattern": MoCLEConfig(
        **SETTINGS, rank_pattern={"up_proj": 2, r"layers\.1\.mlp\.down_proj": 6}, alpha_pattern={"down_proj": 5}
    ),
    "attention": MoCLEConfig(**SETTINGS, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]),
    "head": MoCLEConfig(**SETTINGS, target_modules=["lm_head"]),
    "two_layers": MoCLEConfig(**SETTINGS, target_modules=["up_proj"], layers_to_transform=[0, 2]),
    "modules_to_save": MoCLEConfig(**SETTINGS, modules_to_save=["lm_head"]),
}


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def adapted(config=CONFIGS["top_1"], base=None):
    # PEFT completes a configuration, which must not reach the next test
    model = get_peft_model(base or tiny_llama(), copy.deepcopy(config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.1)
    return model.eval()


@torch.no_grad()
def logits_of(model, cluster=None, **inputs):
    batch = inputs or {key: value for key, value in token_batch().items() if key != "labels"}
    if cluster is not None:
        batch["cluster_ids"] = torch.full((2,), cluster)
    return model.eval()(**batch).logits


def tiny_gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, pad_token_id=0, bos_token_id=1, eos_token_id=1
    )
    return transformers.GPT2LMHeadModel(config)


@pytest.mark.parametrize("cluster", [0, NUM_CLUSTERS - 1])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_export_equals_mocle_for_its_cluster(config, cluster, tmp_path):
    model = adapted(config)
    expected = logits_of(model, cluster)
    export_cluster_lora(model, cluster, tmp_path)
    exported = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    close(logits_of(exported), expected)
    assert not torch.allclose(expected, logits_of(tiny_llama()), atol=1e-2)
    assert not torch.allclose(expected, logits_of(model, 1), atol=1e-3)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_scaling_is_one_and_ranks_add_up_in_every_linear(config, tmp_path):
    model = adapted(config)
    export_cluster_lora(model, 0, tmp_path)
    exported = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    num_experts = config.top_k + config.universal_expert
    for name, layer in model.base_model.model.named_modules():
        if hasattr(layer, "mocle_A"):
            lora = exported.base_model.model.get_submodule(name)
            assert lora.scaling["default"] == 1.0
            assert lora.r["default"] == layer.r["default"] * num_experts
    has_lora = {name for name, module in exported.base_model.model.named_modules() if hasattr(module, "lora_A")}
    has_mocle = {name for name, module in model.base_model.model.named_modules() if hasattr(module, "mocle_A")}
    assert has_lora == has_mocle


def test_rank_in_the_configuration_is_the_largest_one(tmp_path):
    config = PeftConfig.from_pretrained(export_cluster_lora(adapted(CONFIGS["rank_pattern"]), 0, tmp_path))
    assert (config.r, config.lora_alpha) == (12, 12)
    assert config.rank_pattern == config.alpha_pattern
    assert sorted(config.rank_pattern.values()) == [4, 8, 8]


def test_conv1d_is_exported_with_its_transposed_weight(tmp_path):
    model = adapted(base=tiny_gpt2())
    export_cluster_lora(model, 2, tmp_path)
    exported = PeftModel.from_pretrained(tiny_gpt2(), tmp_path)
    assert exported.peft_config["default"].fan_in_fan_out
    close(logits_of(exported), logits_of(model, 2))
    close(logits_of(exported.merge_and_unload()), logits_of(model, 2))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_merged_export_equals_mocle(config, tmp_path):
    model = adapted(config)
    export_cluster_lora(model, 3, tmp_path)
    merged = PeftModel.from_pretrained(tiny_llama(), tmp_path).merge_and_unload(safe_merge=True)
    close(logits_of(merged), logits_of(model, 3))


def test_universal_expert_is_exported_as_the_fallback_uses_it(tmp_path):
    model = adapted(MoCLEConfig(**SETTINGS, fallback="universal"))
    export_cluster_lora(model, None, tmp_path)
    exported = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert exported.peft_config["default"].r == SETTINGS["r"]
    close(logits_of(exported), logits_of(model))


def test_classification_head_goes_along(tmp_path):
    settings = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "pad_token_id": 0,
    }
    base = transformers.LlamaForSequenceClassification(
        transformers.LlamaConfig(**settings, num_attention_heads=4, num_labels=3)
    )
    base.save_pretrained(tmp_path / "base")
    base = transformers.LlamaForSequenceClassification.from_pretrained(tmp_path / "base")
    model = adapted(MoCLEConfig(**SETTINGS, task_type="SEQ_CLS"), base)
    export_cluster_lora(model, 1, tmp_path / "export")
    exported = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "export", num_labels=3)
    assert "base_model.model.score.weight" in load_file(tmp_path / "export" / "adapter_model.safetensors")
    close(logits_of(exported), logits_of(model, 1))


def test_model_adapted_by_transformers_is_exported(tmp_path):
    model = tiny_llama()
    model.add_adapter(MoCLEConfig(**SETTINGS, modules_to_save=["lm_head"]))
    export_cluster_lora(model, 4, tmp_path)
    plain = tiny_llama()
    plain.load_adapter(str(tmp_path))
    close(logits_of(plain), logits_of(model, 4))
    close(logits_of(PeftModel.from_pretrained(tiny_llama(), tmp_path)), logits_of(model, 4))


def test_active_adapter_of_several_is_exported_unless_one_is_named(tmp_path):
    model = adapted()
    model.add_adapter("other", MoCLEConfig(**SETTINGS, target_modules=["q_proj"]))
    first = logits_of(model, 0)
    model.set_adapter("other")
    second = logits_of(model, 0)
    export_cluster_lora(model, 0, tmp_path / "active")
    export_cluster_lora(model, 0, tmp_path / "named", adapter_name="default")
    close(logits_of(PeftModel.from_pretrained(tiny_llama(), tmp_path / "active")), second)
    close(logits_of(PeftModel.from_pretrained(tiny_llama(), tmp_path / "named")), first)


def test_linear_whose_name_ends_another_name_is_selected_alone(tmp_path):
    class Inner(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
            self.config = transformers.PretrainedConfig()

        def forward(self, x, **kwargs):
            return self.second(self.first(x))

    class Outer(Inner):
        def __init__(self):
            super().__init__()
            self.inner = Inner()

        def forward(self, x, **kwargs):
            return self.inner(super().forward(x))

    def base():
        torch.manual_seed(0)
        return Outer()

    x = torch.randn(2, 8)
    model = get_peft_model(base(), MoCLEConfig(**SETTINGS, target_modules="first|inner.second")).eval()
    expected = model(x=x, cluster_ids=torch.tensor([1, 1]))
    export_cluster_lora(model, 1, tmp_path)
    close(PeftModel.from_pretrained(base(), tmp_path).eval()(x=x), expected)


def test_export_in_training_mode_draws_no_noise_and_keeps_the_mode(tmp_path):
    model = adapted()
    expected = logits_of(model, 0)
    model.train()
    export_cluster_lora(model, 0, tmp_path)
    assert all(module.training for module in model.modules())
    close(logits_of(PeftModel.from_pretrained(tiny_llama(), tmp_path)), expected)


def test_half_precision_experts_stay_in_their_dtype(tmp_path):
    model = adapted(base=tiny_llama().bfloat16())
    model.to(torch.bfloat16)
    expected = logits_of(model, 0).float()
    export_cluster_lora(model, 0, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    exported = PeftModel.from_pretrained(tiny_llama().bfloat16(), tmp_path, autocast_adapter_dtype=False)
    torch.testing.assert_close(logits_of(exported).float(), expected, rtol=0.02, atol=0.02)


PLAIN_PEFT = """
import sys
sys.modules["peft_moe"] = None  # an import would raise
import torch, transformers
from peft import PeftModel
base = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
model = PeftModel.from_pretrained(base, sys.argv[2]).eval()
del sys.modules["peft_moe"]
with torch.no_grad():
    torch.save(model(torch.load(sys.argv[3])).logits, sys.argv[4])
assert not any(name.split(".")[0] == "peft_moe" for name in sys.modules)
"""


@pytest.mark.slow
def test_plain_peft_in_a_fresh_process_computes_the_same_logits(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    model = adapted(CONFIGS["top_2"], transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    export_cluster_lora(model, 3, tmp_path / "export")
    input_ids = token_batch()["input_ids"]
    torch.save(input_ids, tmp_path / "ids")
    arguments = [str(tmp_path / name) for name in ("base", "export", "ids", "logits")]
    subprocess.run([sys.executable, "-c", PLAIN_PEFT, *arguments], check=True)
    close(torch.load(tmp_path / "logits"), logits_of(model, 3, input_ids=input_ids))


def test_files_are_those_of_peft_with_a_card(tmp_path):
    base = tiny_llama()
    base.name_or_path = "some-one/some-model"
    export_cluster_lora(adapted(base=base), 3, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 8, 8)
    assert config["base_model_name_or_path"] == "some-one/some-model"
    assert sorted(config["target_modules"]) == ["down_proj", "up_proj"]
    card = (tmp_path / "README.md").read_text()
    assert "library_name: peft" in card and "base_model: some-one/some-model" in card and "# Cluster 3" in card


def test_export_in_the_card_of_a_local_base_claims_no_hub_id(tmp_path):
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    model = adapted(base=transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    card = (export_cluster_lora(model, 0, tmp_path / "export") / "README.md").read_text()
    assert "\nbase_model:" not in card


# which folders may be written


def test_second_export_replaces_the_first_and_leaves_other_files(tmp_path):
    model = adapted()
    export_cluster_lora(model, 0, tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    export_cluster_lora(model, 2, tmp_path)
    close(logits_of(PeftModel.from_pretrained(tiny_llama(), tmp_path)), logits_of(model, 2))
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_other_adapters_are_not_overwritten(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path / "mocle")
    get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "model.safetensors").write_text("")
    for folder, found in (
        ("mocle", "adapter_config.json"),
        ("lora", "adapter_config.json"),
        ("full", "model.safetensors"),
    ):
        before = {path: path.read_bytes() for path in (tmp_path / folder).iterdir()}
        with pytest.raises(ValueError, match=f"holds .*{found}.*which no export has written"):
            export_cluster_lora(model, 0, tmp_path / folder)
        assert before == {path: path.read_bytes() for path in (tmp_path / folder).iterdir()}


@pytest.mark.parametrize("is_second", [False, True], ids=["first", "second"])
@pytest.mark.parametrize("crash_at", range(4))
def test_crash_leaves_no_adapter_or_a_whole_one(crash_at, is_second, tmp_path, monkeypatch):
    import peft_moe.tuners.mocle.export as export

    model = adapted()
    if is_second:
        export_cluster_lora(model, 0, tmp_path)
    replace, calls = export.os.replace, []

    def crash(*args):
        calls.append(args)
        if len(calls) == crash_at:
            raise KeyboardInterrupt
        replace(*args)

    with monkeypatch.context() as patch:
        patch.setattr(export.os, "replace", crash)
        if crash_at:
            with pytest.raises(KeyboardInterrupt):
                export_cluster_lora(model, 1, tmp_path)
            assert not (tmp_path / "adapter_config.json").exists()
        else:
            export_cluster_lora(model, 1, tmp_path)
    export_cluster_lora(model, 1, tmp_path)
    close(logits_of(PeftModel.from_pretrained(tiny_llama(), tmp_path)), logits_of(model, 1))
    assert len(list(tmp_path.iterdir())) == 3


# bad input


@pytest.mark.parametrize("cluster", [-1, NUM_CLUSTERS, 1000])
def test_cluster_out_of_range_is_refused(cluster, tmp_path):
    with pytest.raises(ValueError, match=rf"between 0 and 4 \(num_clusters=5\), but is {cluster}"):
        export_cluster_lora(adapted(), cluster, tmp_path / "export")
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize("cluster", [1.0, "1", True, [1], torch.tensor([0, 1])], ids=str)
def test_cluster_that_is_no_number_is_refused(cluster, tmp_path):
    with pytest.raises(TypeError, match="cluster must be|integer"):
        export_cluster_lora(adapted(), cluster, tmp_path)


@pytest.mark.parametrize("cluster", [np.int64(2), torch.tensor(2)], ids=["numpy", "torch"])
def test_whole_numbers_of_other_libraries_are_taken(cluster, tmp_path):
    model = adapted()
    export_cluster_lora(model, cluster, tmp_path)
    close(logits_of(PeftModel.from_pretrained(tiny_llama(), tmp_path)), logits_of(model, 2))
    assert "# Cluster 2 " in (tmp_path / "README.md").read_text()


def test_universal_expert_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="universal_expert=False"):
        export_cluster_lora(adapted(CONFIGS["no_universal"]), None, tmp_path)


def test_model_without_mocle_is_refused(tmp_path):
    for model in (tiny_llama(), get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))):
        with pytest.raises(ValueError, match="has no MoCLE adapter"):
            export_all(model, tmp_path)


def test_unknown_adapter_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no MoCLE adapter 'mine' in this model, but \['default'\]"):
        export_cluster_lora(adapted(), 0, tmp_path, adapter_name="mine")


def test_several_active_adapters_need_a_name(tmp_path):
    model = tiny_llama()
    model.add_adapter(MoCLEConfig(**SETTINGS), "one")
    model.add_adapter(MoCLEConfig(**SETTINGS), "two")
    model.set_adapter(["one", "two"])
    with pytest.raises(ValueError, match=r"2 of the MoCLE adapters \['one', 'two'\] are active.*adapter_name='one'"):
        export_cluster_lora(model, 0, tmp_path)


@pytest.mark.parametrize("export", [lambda m, p: export_cluster_lora(m, 0, p), export_all], ids=["one", "all"])
def test_path_of_a_file_is_refused(export, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="is a file"):
        export(adapted(), tmp_path / "file")


def test_weights_on_the_meta_device_are_refused(tmp_path):
    with pytest.raises(ValueError, match="not in this process"):
        export_cluster_lora(adapted().to("meta"), 0, tmp_path)


# all routes


def with_equal_routes():
    """Clusters 1 and 3 are equal, and so are 2 and 4."""
    model = adapted(CONFIGS["top_2"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mocle_embedding" in name:
                parameter[3], parameter[4] = parameter[1], parameter[2]
    return model


def test_clusters_of_one_route_share_an_adapter(tmp_path):
    model = with_equal_routes()
    folders = export_all(model, tmp_path)
    assert [folder.name for folder in folders] == ["cluster_0", "cluster_1", "cluster_2"]
    table = json.loads((tmp_path / "clusters.json").read_text())
    assert table["adapters"] == ["cluster_0", "cluster_1", "cluster_2", "cluster_1", "cluster_2"]
    assert (table["format_version"], table["centroids"], table["max_lora_rank"]) == (1, None, 12)
    for cluster, name in enumerate(table["adapters"]):
        exported = PeftModel.from_pretrained(tiny_llama(), tmp_path / name)
        close(logits_of(exported), logits_of(model, cluster))
    with safe_open(tmp_path / "cluster_1" / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "mocle_cluster": "1,3"}
    assert "# Clusters 1, 3 " in (tmp_path / "cluster_1" / "README.md").read_text()


def test_saturated_gates_leave_one_route_per_expert(tmp_path):
    model = adapted(MoCLEConfig(**{**SETTINGS, "num_experts": 2}, target_modules=["lm_head"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mocle_embedding" in name:
                parameter.mul_(10_000)
    assert len(export_all(model, tmp_path)) == 2


def test_second_export_of_all_removes_adapters_that_are_no_more(tmp_path):
    export_all(adapted(CONFIGS["top_2"]), tmp_path)
    (tmp_path / "cluster_4" / "notes.txt").write_text("mine")
    (tmp_path / "cluster_mine").mkdir()
    export_all(with_equal_routes(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("cluster_0", "cluster_1", "cluster_2", "cluster_4", "cluster_mine", "clusters.json")
    ]
    assert [path.name for path in (tmp_path / "cluster_4").iterdir()] == ["notes.txt"]


def test_export_of_all_next_to_the_adapter_it_came_from(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    export_all(model, tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    close(logits_of(again, 0), logits_of(PeftModel.from_pretrained(tiny_llama(), tmp_path, subfolder="cluster_0")))


def test_export_of_all_refuses_before_it_writes(tmp_path):
    model = adapted()
    get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "cluster_3")
    with pytest.raises(ValueError, match="holds .*adapter_config.json"):
        export_all(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["cluster_3"]


# the client: a text gets the adapter of its cluster


class WordEncoder(SentenceEncoder):
    """The width of a vector is 8; words decide its direction."""

    WORDS = ("colour", "sort", "sum", "poem", "law")

    def __init__(self):
        super().__init__("words")

    @property
    def embedding_dim(self):
        return 8

    def encode(self, texts, **options):
        vectors = torch.zeros(len(texts), 8)
        for row, text in enumerate(texts):
            for column, word in enumerate(self.WORDS):
                vectors[row, column] = text.lower().count(word)
        return vectors


@pytest.fixture
def clusterer():
    centroids = torch.eye(NUM_CLUSTERS, 8) + 0.1 * torch.rand(NUM_CLUSTERS, 8)
    return InstructionClusterer(centroids, encoder=WordEncoder(), template="Task: {}")


@pytest.fixture
def exported(clusterer, tmp_path):
    settings = {key: value for key, value in SETTINGS.items() if key not in ("num_clusters", "cluster_embedding_dim")}
    model = adapted(MoCLEConfig.from_clusterer(clusterer, **settings))
    export_all(model, tmp_path / "export")
    return tmp_path / "export"


def test_router_picks_the_adapter_of_the_cluster(exported, clusterer):
    router = ClusterAdapterRouter.from_pretrained(exported, encoder=WordEncoder())
    texts = ["Which colour?", [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "A poem"}]}]]
    assert router.adapter_for(texts[0]) == "cluster_0"
    assert router.adapter_for(texts[1]) == "cluster_3"
    assert router.adapters_for([*texts, "Sort it"]) == ["cluster_0", "cluster_3", "cluster_1"]
    torch.testing.assert_close(router.clusterer.centroids, clusterer.centroids, rtol=0, atol=0)
    assert router.clusterer.template == "Task: {}"


def test_adapter_that_the_router_picks_is_mocle_for_the_text(exported, clusterer):
    settings = {key: value for key, value in SETTINGS.items() if key not in ("num_clusters", "cluster_embedding_dim")}
    torch.manual_seed(0)
    model = adapted(MoCLEConfig.from_clusterer(clusterer, **settings))
    export_all(model, exported)
    name = ClusterAdapterRouter.from_pretrained(exported, encoder=WordEncoder()).adapter_for("The sum of two")
    plain = PeftModel.from_pretrained(tiny_llama(), exported / name)
    close(logits_of(plain), logits_of(model, int(clusterer.predict(["The sum of two"]))))


@pytest.mark.slow
def test_router_with_the_real_encoder_agrees_with_the_clusterer(tmp_path):
    texts = ["What colour is the car?", "Which colour is the dog?", "Sort a list in Python.", "Sort an array in C."]
    clusterer = InstructionClusterer.fit(texts, 2, encoder=minilm_path(), show_progress=False)
    export_all(adapted(MoCLEConfig.from_clusterer(clusterer, init_lora_weights=False)), tmp_path)
    router = ClusterAdapterRouter.from_pretrained(tmp_path)
    assert router.adapters_for(texts) == [f"cluster_{cluster}" for cluster in clusterer.predict(texts).tolist()]
    assert router.adapter_for("What is the colour of the sky?") == router.adapter_for(texts[0])
    assert router.adapter_for("Sort words in Rust.") == router.adapter_for(texts[2]) != router.adapter_for(texts[0])


def test_router_needs_centroids(tmp_path):
    export_all(adapted(), tmp_path)
    with pytest.raises(ValueError, match="holds no centroids.*from_clusterer"):
        ClusterAdapterRouter.from_pretrained(tmp_path)


def test_router_refuses_a_damaged_table(exported):
    file = exported / "clusters.json"
    text = file.read_text()
    table = json.loads(text)
    table["centroids"][0][0] += 0.5
    tampered = json.dumps(table)
    fewer = json.dumps({**json.loads(text), "adapters": ["cluster_0"]})
    without = json.dumps({key: value for key, value in json.loads(text).items() if key != "template"})
    for damaged in (text[:-50], tampered, fewer, without, "[]", ""):
        file.write_text(damaged)
        with pytest.raises(ValueError, match="clusters.json in .* is damaged"):
            ClusterAdapterRouter.from_pretrained(exported)


def test_router_refuses_a_newer_format(exported):
    file = exported / "clusters.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format_version": 2}))
    with pytest.raises(ValueError, match="format 2.*Upgrade"):
        ClusterAdapterRouter.from_pretrained(exported)


def test_router_of_a_folder_without_table_says_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match="holds no clusters.json"):
        ClusterAdapterRouter.from_pretrained(tmp_path)
    with pytest.raises(OSError, match="is no folder here"):
        ClusterAdapterRouter.from_pretrained("no-one/no-adapter")


def test_router_needs_an_adapter_per_cluster(clusterer):
    with pytest.raises(ValueError, match="5 clusters, but 1 adapters"):
        ClusterAdapterRouter(clusterer, ["cluster_0"])
