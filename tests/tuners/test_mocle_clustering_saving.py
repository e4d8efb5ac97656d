"""Saved clusters are loaded as they were, or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_encoder import TEXTS

from peft_moe import InstructionClusterer


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
        assert sorted(path.name for path in folder.iterdir()) == [
            "README.md",
            "clusterer.safetensors",
            "clusterer_config.json",
        ]
        assert sorted(load_file(folder / "clusterer.safetensors")) == ["centroids", "cluster_sizes"]
        written = "".join(path.read_text() for path in folder.iterdir() if path.suffix != ".safetensors")
        assert "red green" not in written

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

    def test_the_encoder_is_not_needed_for_loading(self, clusterer, folder):
        path = folder / "clusterer_config.json"
        path.write_text(path.read_text().replace(clusterer.encoder_name, "gone/encoder"))
        loaded = InstructionClusterer.from_pretrained(folder)
        assert loaded.encoder_name == "gone/encoder"
        assert loaded.predict_embeddings(clusterer.centroids).tolist() == [0, 1, 2]

    def test_the_encoder_may_be_found_elsewhere(self, encoder, folder, clusterer):
        path = folder / "clusterer_config.json"
        path.write_text(path.read_text().replace(clusterer.encoder_name, "gone/encoder"))
        loaded = InstructionClusterer.from_pretrained(folder, encoder=encoder)
        assert torch.equal(loaded.predict(TEXTS), clusterer.predict(TEXTS))
        assert loaded.encoder_name == "gone/encoder"

    def test_the_card_names_the_library(self, folder):
        card = (folder / "README.md").read_text()
        assert card.startswith("---\n") and "library_name: peft_moe" in card and "- mocle" in card

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
        assert uploaded == ["README.md", "clusterer.safetensors", "clusterer_config.json"]

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
