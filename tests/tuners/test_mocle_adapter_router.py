"""The client's side of an export: a text gets the adapter of its cluster."""

import json

import pytest
import torch
from mocle_to_export import NUM_CLUSTERS, SETTINGS, adapted, close, logits_of
from peft import PeftModel

from peft_moe import MoCLEConfig
from peft_moe.tuners.mocle.clustering import InstructionClusterer
from peft_moe.tuners.mocle.export import ClusterAdapterRouter, export_all
from peft_moe.tuners.mocle.encoder import SentenceEncoder
from pretrained import minilm_path
from tiny_models import tiny_llama


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
