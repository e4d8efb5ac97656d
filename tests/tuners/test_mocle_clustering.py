"""Clusters of instructions, found, saved and loaded: on a tiny encoder with random weights and, where marked slow, on
the real one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from safetensors.torch import load_file, save_file
from sklearn.cluster import KMeans
from tiny_encoder import LABELS, TEXTS, TOPICS, WIDTH

from domains import DATA, DOMAINS
from peft_moe import InstructionClusterer, choose_num_clusters
from peft_moe.tuners.mocle import clustering
from peft_moe.tuners.mocle.clustering import nearest_centroid
from peft_moe.tuners.mocle.encoder import SentenceEncoder
from pretrained import minilm_path


CHATS = [[{"role": "user", "content": f"<image>\n{text}"}, {"role": "assistant", "content": "cat"}] for text in TEXTS]


@pytest.fixture
def never_encodes(monkeypatch):
    """Any use of an encoder fails: what is wrong has to be said before."""
    monkeypatch.setattr(SentenceEncoder, "_loaded", lambda self: pytest.fail("the encoder was used"))


class TestNearestCentroid:
    def test_it_equals_that_of_scikit_learn(self):
        generator = np.random.default_rng(0)
        points = generator.normal(size=(5000, 24)).astype(np.float32)
        model = KMeans(17, n_init=1, random_state=0).fit(points)
        ours = nearest_centroid(torch.from_numpy(points), torch.from_numpy(model.cluster_centers_))
        assert ours.tolist() == model.predict(points).tolist()

    def test_of_equal_ones_the_lowest_id_is_taken(self):
        centroids = torch.randn(40, 384)[torch.arange(80) % 40]
        ids = nearest_centroid(torch.randn(300, 384), centroids)
        assert ids.max() < 40

    def test_the_middle_between_two_belongs_to_the_first(self):
        assert nearest_centroid(torch.zeros(1, 2), torch.tensor([[1.0, 0.0], [-1.0, 0.0]])).tolist() == [0]

    def test_a_row_does_not_depend_on_the_others(self):
        points, centroids = torch.randn(5000, 16), torch.randn(8, 16)
        alone = [nearest_centroid(points[index : index + 1], centroids).item() for index in (0, 4095, 4096, 4999)]
        assert nearest_centroid(points, centroids)[[0, 4095, 4096, 4999]].tolist() == alone

    def test_no_rows_give_no_ids(self):
        assert nearest_centroid(torch.empty(0, 4), torch.ones(2, 4)).shape == (0,)

    @pytest.mark.parametrize(
        ("embeddings", "message"),
        [
            (torch.ones(3, 4), r"\(3, 4\) do not fit centroids of shape \(2, 1\)"),
            (torch.tensor([[float("nan")]]), "embeddings hold values that are not finite"),
        ],
        ids=["width", "nan"],
    )
    def test_values_without_a_nearest_one_are_refused(self, embeddings, message):
        with pytest.raises(ValueError, match=message):
            nearest_centroid(embeddings, torch.ones(2, 1))


class TestFit:
    def test_topics_become_clusters(self, clusterer):
        ids = clusterer.predict(TEXTS).tolist()
        assert len(set(zip(LABELS, ids))) == len(set(ids)) == 3

    def test_centroids_are_those_of_scikit_learn(self, clusterer, embeddings):
        expected = KMeans(3, n_init=10, random_state=0).fit(embeddings.numpy(), sample_weight=np.ones(96, np.float32))
        np.testing.assert_allclose(clusterer.centroids.numpy(), expected.cluster_centers_, atol=1e-6)
        assert (clusterer.centroids.dtype, clusterer.cluster_sizes.dtype) == (torch.float32, torch.int64)
        assert (clusterer.num_clusters, clusterer.embedding_dim) == (3, WIDTH)
        assert clusterer.cluster_sizes.tolist() == [32, 32, 32]

    def test_the_same_seed_gives_the_same_clusters(self, clusterer, encoder):
        again = InstructionClusterer.fit(TEXTS, 3, encoder=encoder, show_progress=False)
        assert torch.equal(again.centroids, clusterer.centroids)

    def test_repeated_texts_are_encoded_once_and_weigh_as_often_as_they_occur(self, encoder, monkeypatch):
        seen = []
        encode = SentenceEncoder.encode
        monkeypatch.setattr(
            SentenceEncoder, "encode", lambda self, texts, **kw: seen.extend(texts) or encode(self, texts, **kw)
        )
        clusterer = InstructionClusterer.fit(["red", "cat", "red ", "red"], 1, encoder=encoder, show_progress=False)
        assert seen == ["red", "cat"]
        vectors = encode(encoder, ["red", "cat"])
        torch.testing.assert_close(clusterer.centroids[0], 0.75 * vectors[0] + 0.25 * vectors[1])
        assert clusterer.cluster_sizes.tolist() == [4]

    def test_many_texts_go_to_mini_batches(self, encoder, monkeypatch):
        monkeypatch.setattr(clustering, "KMEANS_MAX_TEXTS", 50)
        clusterer = InstructionClusterer.fit(TEXTS, 3, encoder=encoder, show_progress=False)
        assert sorted(clusterer.cluster_sizes.tolist()) == [32, 32, 32]

    @pytest.mark.parametrize(
        ("texts", "pattern"),
        [
            (Dataset.from_dict({"prompt": TEXTS})["prompt"], None),
            (CHATS, None),
            (Dataset.from_dict({"messages": CHATS})["messages"], None),
            ([f"A chat. USER: {text} ASSISTANT: cat" for text in TEXTS], "USER: (.*?) ASSISTANT:"),
        ],
        ids=["column", "chats", "column of chats", "pattern"],
    )
    def test_the_instruction_of_each_text_counts_wherever_it_stands(self, clusterer, encoder, texts, pattern):
        again = InstructionClusterer.fit(texts, 3, encoder=encoder, instruction_pattern=pattern, show_progress=False)
        assert torch.equal(again.centroids, clusterer.centroids)
        assert torch.equal(again.predict(texts), clusterer.predict(TEXTS))

    def test_the_template_is_what_is_encoded(self, clusterer, encoder):
        settings = {"encoder": encoder, "show_progress": False}
        with_template = InstructionClusterer.fit(["red", "cat"], 2, template="two {} number", **settings)
        without = InstructionClusterer.fit(["two red number", "two cat number"], 2, **settings)
        assert torch.equal(with_template.centroids, without.centroids)

    def test_progress_is_shown_where_it_is_wanted(self, encoder, capsys):
        InstructionClusterer.fit(TEXTS, 2, encoder=encoder)
        assert "Batches" in capsys.readouterr().err
        InstructionClusterer.fit(TEXTS, 2, encoder=encoder, show_progress=False)
        assert capsys.readouterr().err == ""

    @pytest.mark.parametrize(
        "texts, settings, message",
        [
            ([], {}, "no texts to cluster"),
            ("red", {}, "this is a str. Put a single one into a list"),
            (3, {}, "this is a int"),
            (["red", "red", "cat"], {"num_clusters": 3}, "3 clusters .* only 2 different instructions"),
            (["red", "cat", " <image> "], {}, "Text 2: The instruction is empty"),
            (["red", None], {}, "Text 1: .*NoneType"),
            (["red", "cat"], {"num_clusters": 0}, "num_clusters .* at least 1, but is 0"),
            (["red", "cat"], {"num_clusters": 2.0}, "num_clusters .* but is 2.0"),
            (["red", "cat"], {"num_clusters": True}, "num_clusters .* but is True"),
            (["red", "cat"], {"template": "Question:"}, "'{}' exactly once"),
            (["red", "cat"], {"template": "{} {}"}, "'{}' exactly once"),
            (["red", "cat"], {"instruction_pattern": "USER"}, "has 0 groups"),
            (Dataset.from_dict({"prompt": ["red"]}), {}, r"dataset\['prompt'\]"),
        ],
        ids=lambda value: None if isinstance(value, dict | str) else type(value).__name__,
    )
    def test_bad_input_is_refused_before_any_work(self, never_encodes, texts, settings, message):
        with pytest.raises(ValueError, match=message):
            InstructionClusterer.fit(texts, **{"num_clusters": 2, "encoder": "unused/encoder", **settings})

    def test_texts_that_the_encoder_cannot_tell_apart_do_not_count_twice(self, encoder):
        with pytest.raises(ValueError, match="3 clusters .* only 2 different embeddings"):
            InstructionClusterer.fit(["red", "unknown", "unheard"], 3, encoder=encoder, show_progress=False)

    def test_an_encoder_of_another_width_is_refused(self, tmp_path, clusterer, encoder):
        other = InstructionClusterer(torch.ones(2, 8), encoder=encoder)
        with pytest.raises(ValueError, match="vectors of width 32, but the centroids are of width 8"):
            other.predict(["red"])


class TestClusterIds:
    def test_a_data_set_gets_a_column(self, clusterer):
        dataset = clusterer.add_cluster_ids(
            Dataset.from_dict({"prompt": TEXTS, "row": list(range(96))}), "prompt", batch_size=20
        )
        assert dataset.column_names == ["prompt", "row", "cluster_ids"]
        assert dataset["cluster_ids"][:] == clusterer.predict(TEXTS).tolist()
        assert dataset.features["cluster_ids"].dtype == "int64"

    def test_every_split_gets_a_column(self, clusterer):
        splits = DatasetDict(
            {name: Dataset.from_dict({"prompt": texts}) for name, texts in (("a", TEXTS[:3]), ("b", TEXTS[60:]))}
        )
        added = clusterer.add_cluster_ids(splits, "prompt", output_column="topic")
        assert isinstance(added, DatasetDict)
        assert added["b"]["topic"][:] == clusterer.predict(TEXTS[60:]).tolist()

    @pytest.mark.parametrize("is_known", [True, False], ids=["known columns", "unknown columns"])
    def test_a_stream_gets_a_column(self, clusterer, is_known):
        if is_known:
            stream = Dataset.from_dict({"prompt": TEXTS}).to_iterable_dataset(num_shards=3)
        else:
            stream = IterableDataset.from_generator(lambda: ({"prompt": text} for text in TEXTS))
        rows = list(clusterer.add_cluster_ids(stream, "prompt", batch_size=10))
        assert [row["cluster_ids"] for row in rows] == clusterer.predict(TEXTS).tolist()

    def test_a_missing_column_is_answered_with_those_there_are(self, clusterer):
        with pytest.raises(ValueError, match=r"no column 'text'. Its columns are \['prompt'\]"):
            clusterer.add_cluster_ids(Dataset.from_dict({"prompt": TEXTS}), "text")

    def test_a_column_that_is_there_is_not_overwritten(self, clusterer):
        dataset = Dataset.from_dict({"prompt": ["red"], "cluster_ids": [7]})
        with pytest.raises(ValueError, match="already has a column 'cluster_ids'"):
            clusterer.add_cluster_ids(dataset, "prompt")

    def test_an_empty_row_is_named_by_its_place_in_the_data_set(self, clusterer):
        with pytest.raises(ValueError, match="Text 15: The instruction is empty"):
            clusterer.add_cluster_ids(Dataset.from_dict({"prompt": [*TEXTS[:15], " "]}), "prompt", batch_size=10)

    def test_a_list_is_no_data_set(self, clusterer):
        with pytest.raises(ValueError, match="got a list. predict gives"):
            clusterer.add_cluster_ids(TEXTS, "prompt")


class TestReport:
    @pytest.fixture
    def report(self, clusterer):
        dataset = Dataset.from_dict({"prompt": TEXTS, "topic": LABELS})
        return clusterer.report(dataset, "prompt", domain_column="topic")

    def test_clusters_are_compared_with_domains(self, report):
        assert (report.adjusted_rand_index, report.purity) == (1.0, 1.0)
        assert list(report.domain_counts) == sorted(TOPICS)
        assert sorted(report.domain_counts["animals"]) == [0, 0, 32]

    def test_examples_are_those_nearest_to_the_centroid(self, report, clusterer, embeddings):
        distances = (embeddings - clusterer.centroids[1]).norm(dim=1)
        assert list(report.examples[1]) == [TEXTS[index] for index in distances.argsort()[:3]]

    def test_it_reads_as_a_markdown_table(self, report):
        lines = str(report).splitlines()
        assert lines[0] == "96 texts in 3 clusters of 32 to 32, 0 empty."
        assert "adjusted Rand index 1.000" in lines[2]
        assert lines[4].split("|")[1:-1] == [
            f" {name} " for name in ("cluster", "texts", "share", *sorted(TOPICS))
        ] + [f" {'typical'.ljust(len(lines[4].split('|')[-2]) - 2)} "]
        assert len({len(line) for line in lines[4:]}) == 1
        assert json.loads(json.dumps(report.to_dict()))["sizes"] == [32, 32, 32]

    def test_without_domains_there_is_no_comparison(self, clusterer):
        report = clusterer.report(["red", "red", "red blue", "cat"], num_examples=1)
        assert sorted(report.sizes) == [0, 1, 3]
        assert report.purity is None and "Rand" not in str(report) and "1 empty" in str(report)

    def test_columns_have_to_exist(self, clusterer):
        dataset = Dataset.from_dict({"prompt": TEXTS})
        with pytest.raises(ValueError, match="no column 'source'"):
            clusterer.report(dataset, "prompt", domain_column="source")
        splits = DatasetDict({"train": dataset})
        for texts, column in ((dataset, None), (splits, "prompt"), (TEXTS, "prompt")):
            with pytest.raises(ValueError, match="list of texts, or one data set and the column"):
                clusterer.report(texts, column)


class TestChoosingTheNumber:
    def test_the_number_of_topics_is_best(self, encoder):
        choice = choose_num_clusters(TEXTS, (8, 2, 3), encoder=encoder, show_progress=False)
        assert choice.best == 3
        assert [entry.num_clusters for entry in choice.candidates] == [2, 3, 8]
        inertias = [entry.inertia for entry in choice.candidates]
        assert inertias == sorted(inertias, reverse=True)
        assert [line.split("|")[-2].strip() for line in str(choice).splitlines()[2:]] == ["", "best", ""]
        assert json.loads(json.dumps(choice.to_dict()))["best"] == 3

    def test_many_texts_are_judged_by_a_sample(self, encoder, monkeypatch):
        settings = {"encoder": encoder, "show_progress": False}
        whole = choose_num_clusters(TEXTS, (3,), **settings)
        monkeypatch.setattr(clustering, "SILHOUETTE_MAX_TEXTS", 40)
        sample, again = (choose_num_clusters(TEXTS, (3,), **settings) for _ in range(2))
        assert sample == again != whole

    @pytest.mark.parametrize(
        "candidates, message",
        [
            ((), "candidates is empty"),
            ((1, 2), "candidates .* at least 2, but is 1"),
            ((2, 3), "3 clusters of 3 different instructions have no silhouette"),
        ],
    )
    def test_bad_candidates_are_refused_before_any_work(self, never_encodes, candidates, message):
        with pytest.raises(ValueError, match=message):
            choose_num_clusters(["red", "cat", "two"], candidates, encoder="unused/encoder")


FILES = ["README.md", "clusterer.safetensors", "clusterer_config.json"]


class TestSaving:
    @pytest.fixture
    def folder(self, clusterer, tmp_path) -> Path:
        clusterer.save_pretrained(tmp_path / "clusters")
        return tmp_path / "clusters"

    def test_what_is_loaded_is_what_was_saved(self, clusterer, folder):
        loaded = InstructionClusterer.from_pretrained(folder)
        assert torch.equal(loaded.centroids, clusterer.centroids)
        assert torch.equal(loaded.cluster_sizes, clusterer.cluster_sizes)
        for name in ("encoder_name", "template", "instruction_pattern", "seed", "num_texts"):
            assert getattr(loaded, name) == getattr(clusterer, name)
        assert torch.equal(loaded.predict(TEXTS), clusterer.predict(TEXTS))

    def test_the_files_hold_no_text_and_no_pickle(self, folder):
        assert sorted(path.name for path in folder.iterdir()) == FILES
        assert sorted(load_file(folder / "clusterer.safetensors")) == ["centroids", "cluster_sizes"]
        written = "".join(path.read_text() for path in folder.iterdir() if path.suffix != ".safetensors")
        assert "red green" not in written
        card = (folder / "README.md").read_text()
        assert card.startswith("---\n") and "library_name: peft_moe" in card and "- mocle" in card

    def test_template_and_pattern_are_kept(self, encoder, tmp_path):
        settings = {"template": "Question: {} Short answer:", "instruction_pattern": "USER: (.*)"}
        InstructionClusterer(torch.eye(3), encoder=encoder, **settings).save_pretrained(tmp_path)
        loaded = InstructionClusterer.from_pretrained(tmp_path)
        assert {name: getattr(loaded, name) for name in settings} == settings

    def test_the_folder_of_an_adapter_keeps_its_files(self, clusterer, tmp_path):
        for name in ("config.json", "adapter_config.json", "README.md"):
            (tmp_path / name).write_text("mine")
        clusterer.save_pretrained(tmp_path)
        InstructionClusterer.from_pretrained(tmp_path).save_pretrained(tmp_path)
        assert [(tmp_path / name).read_text() for name in ("config.json", "adapter_config.json", "README.md")] == [
            "mine"
        ] * 3

    def test_the_encoder_is_not_needed_for_loading_and_may_be_found_elsewhere(self, encoder, folder, clusterer):
        path = folder / "clusterer_config.json"
        path.write_text(path.read_text().replace(clusterer.encoder_name, "gone/encoder"))
        loaded = InstructionClusterer.from_pretrained(folder)
        assert loaded.predict_embeddings(clusterer.centroids).tolist() == [0, 1, 2]
        loaded = InstructionClusterer.from_pretrained(folder, encoder=encoder)
        assert torch.equal(loaded.predict(TEXTS), clusterer.predict(TEXTS))
        assert loaded.encoder_name == "gone/encoder"

    def test_pushing_uploads_these_files(self, clusterer, monkeypatch):
        uploaded = []
        monkeypatch.setattr(
            "huggingface_hub.HfApi.create_repo", lambda self, repo_id, **kw: type("Url", (), {"repo_id": repo_id})
        )
        monkeypatch.setattr(
            "huggingface_hub.HfApi.upload_folder",
            lambda self, folder_path, **kw: uploaded.extend(sorted(path.name for path in Path(folder_path).iterdir())),
        )
        clusterer.push_to_hub("name/clusters")
        assert uploaded == FILES

    @pytest.mark.parametrize("file", ["clusterer.safetensors", "clusterer_config.json"])
    def test_a_missing_file_is_named(self, folder, file):
        (folder / file).unlink()
        with pytest.raises(ValueError, match=f"holds no {file}"):
            InstructionClusterer.from_pretrained(folder)

    @pytest.mark.parametrize("damage", ["truncated", "changed", "exchanged", "not finite", "other size", "no tensor"])
    def test_damaged_centroids_are_refused(self, folder, damage):
        file = folder / "clusterer.safetensors"
        tensors = load_file(file)
        changed = tensors["centroids"].clone()
        changed[0, 0] += {"changed": 1e-3, "not finite": float("inf")}.get(damage, 0.0)
        replacements = {"exchanged": changed.flip(0), "other size": changed[:, :-1].contiguous()}
        if damage == "truncated":
            file.write_bytes(file.read_bytes()[:-40])
        elif damage == "no tensor":
            save_file({"cluster_sizes": tensors["cluster_sizes"]}, file)
        else:
            save_file(tensors | {"centroids": replacements.get(damage, changed)}, file)
        with pytest.raises(ValueError, match=r"is damaged .*Nothing was loaded. Fetch or save the whole folder again"):
            InstructionClusterer.from_pretrained(folder)

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"format_version": 1}', '{"format_version": "new"}'])
    def test_a_damaged_config_is_refused(self, folder, text):
        (folder / "clusterer_config.json").write_text(text)
        with pytest.raises(ValueError, match="is damaged"):
            InstructionClusterer.from_pretrained(folder)

    def test_a_newer_format_is_refused(self, folder):
        path = folder / "clusterer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 2}))
        with pytest.raises(ValueError, match="has format 2, but this version of peft_moe reads up to 1. Upgrade"):
            InstructionClusterer.from_pretrained(folder)

    def test_a_name_that_is_nowhere_is_an_error_of_the_system(self):
        with pytest.raises(OSError, match="'no/clusters' is no folder here, and clusterer_config.json"):
            InstructionClusterer.from_pretrained("no/clusters", local_files_only=True)


@pytest.mark.slow
def test_four_clusters_of_the_real_encoder_separate_four_domains():
    texts, domains = [], []
    for domain in DOMAINS:
        rows = [json.loads(line)["instruction"] for line in (DATA / f"{domain}.jsonl").read_text().splitlines()]
        texts += rows[:60]
        domains += [domain] * 60
    encoder = SentenceEncoder(minilm_path(), device="cpu")
    clusterer = InstructionClusterer.fit(texts, 4, encoder=encoder, show_progress=False)
    report = clusterer.report(Dataset.from_dict({"text": texts, "domain": domains}), "text", domain_column="domain")
    # measured: 0.870 and 0.950, and within 0.02 of that with other seeds
    assert report.adjusted_rand_index > 0.75
    assert report.purity > 0.88
