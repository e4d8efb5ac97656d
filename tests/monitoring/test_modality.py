"""Shares of text and image tokens follow their definition, and reports and pictures show them."""

from __future__ import annotations

import math

import pytest
import torch
from monitored import check_picture, load_of
from peft import get_peft_model

from models.tiny_llava import IMAGE_TOKEN, image_batch, sparse_llava, tiny_llava
from peft_moe import MoCLEConfig, MoLEConfig
from peft_moe.monitoring import (
    ExpertLoad,
    modality_report,
    modality_shares,
    plot_modality,
    record_expert_load,
    record_pathways,
)
from tiny_models import tiny_llama


def by_group(text: list[list[int]], image: list[list[int]], *, adapter: str = "base") -> ExpertLoad:
    groups = (("text", text), ("image", image))
    return load_of(
        {(adapter, f"layers.{i}.mlp", "all", name): c for name, layers in groups for i, c in enumerate(layers)}
    )


@pytest.fixture
def load() -> ExpertLoad:
    """Text has a tenth of the tokens of images; expert 3 is idle."""
    return by_group([[6, 3, 1, 0], [5, 5, 0, 0]], [[10, 70, 20, 0], [0, 0, 50, 50]])


def test_both_modalities_weigh_equally(load):
    first, second = modality_shares(load).values()
    # paper: text counts times #image / #text, then shares of the sums
    rescaled = [text * 10 + image for text, image in zip([6, 3, 1, 0], [10, 70, 20, 0], strict=True)]
    assert first.balanced == pytest.approx([count / sum(rescaled) for count in rescaled])
    assert first.image_fraction[:3] == pytest.approx([10 / 70, 70 / 100, 20 / 30])
    assert math.isnan(first.image_fraction[3])
    assert first.distance == pytest.approx(0.5)
    assert (second.distance, second.image_fraction) == (1.0, [0, 0, 1, 1])


def test_shares_of_a_model_equal_those_of_its_tokens():
    model = sparse_llava(moe_layers="all")
    batch = image_batch(num_padding=2)
    chosen = []
    for layer in model.model.language_model.layers:
        layer.mlp.gate.register_forward_hook(lambda module, args, output: chosen.append(output[2]))
    with torch.no_grad(), record_expert_load(model) as load, record_pathways(model) as pathways:
        model(**batch)
    is_image = (batch["input_ids"] == IMAGE_TOKEN).flatten()
    is_text = batch["attention_mask"].flatten().bool() & ~is_image
    for table, width in ((modality_shares(load), 2), (modality_shares(pathways.expert_load()), 1)):
        for shares, index in zip(table.values(), chosen, strict=True):
            for found, mask in ((shares.text, is_text), (shares.image, is_image)):
                counts = torch.bincount(index[mask, :width].flatten(), minlength=4)
                assert found == pytest.approx((counts / counts.sum()).tolist())


def test_routers_that_saw_one_modality_are_left_out():
    load = by_group([[1, 1], [1, 3]], [[0, 0], [2, 2]])
    assert list(modality_shares(load)) == ["layers.1.mlp"]


def test_adapters_can_be_told_apart():
    load = by_group([[1, 3]], [[2, 2]]) + by_group([[1, 1]], [[0, 2]], adapter="other")
    assert list(modality_shares(load)) == ["base.layers.0.mlp", "other.layers.0.mlp"]
    assert modality_shares(load, adapter="other")["layers.0.mlp"].image == [0, 1]


@pytest.mark.parametrize("use", [modality_shares, modality_report, plot_modality])
def test_one_modality_alone_is_an_error(use):
    with pytest.raises(ValueError, match="no token was counted"):
        use(ExpertLoad())
    with pytest.raises(ValueError, match="only tokens of group 'text'. The config needs image_token_id"):
        use(by_group([[1, 1]], [[0, 0]]))


def test_a_text_model_is_told_what_is_missing():
    load = ExpertLoad.for_model(tiny_llama()) + load_of({("default", "mlp", "all", "all"): [1, 2]})
    with pytest.raises(ValueError, match="only tokens of group 'all'"):
        modality_shares(load)


def test_report_has_the_tables_of_the_paper(load):
    report = modality_report(load)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.splitlines()]
    assert ["0", "0.500"] in lines
    assert ["0", "35.0%", "50.0%", "15.0%", "0.0%"] in lines
    assert ["0", "14.3%", "70.0%", "66.7%", "–"] in lines
    assert ["0", "60.0%", "30.0%", "10.0%", "0.0%"] in lines
    assert ["0", "10.0%", "70.0%", "20.0%", "0.0%"] in lines


def test_png_shows_four_panels_on_two_scales(tmp_path, load):
    pytest.importorskip("matplotlib")
    figure = plot_modality(load, tmp_path / "modality.png")
    panels = {axis.get_title(): axis.images[0] for axis in figure.axes if axis.images}
    assert list(panels) == ["both, with equal weight", "text", "image", "image part of each expert"]
    assert len({image.get_clim() for image in panels.values()}) == 2
    assert panels["image part of each expert"].get_clim() == (0, 1)
    assert panels["text"].get_array()[0].tolist() == pytest.approx([0.6, 0.3, 0.1, 0.0])
    assert panels["image part of each expert"].get_array().mask.tolist() == [[False] * 3 + [True], [False] * 4]
    check_picture(tmp_path / "modality.png")


def test_layers_may_have_different_numbers_of_experts():
    pytest.importorskip("matplotlib")
    load = by_group([[1, 1], [1, 1, 2]], [[3, 1], [1, 1, 1]])
    assert len(modality_report(load).splitlines()) > 10
    panel = plot_modality(load).axes[0]
    assert panel.images[0].get_array().mask.tolist() == [[False, False, True], [False] * 3]


@pytest.mark.parametrize("soft", [False, True])
def test_dense_mixtures_count_their_best_expert(soft):
    torch.manual_seed(0)
    target = r".*language_model.*(gate|up|down)_proj"
    settings = {"num_experts": 3, "top_k": 1, "soft": soft, "target_modules": target, "init_lora_weights": False}
    model = get_peft_model(tiny_llava(), MoLEConfig(**settings)).eval()
    batch = image_batch(num_padding=2)
    with torch.no_grad(), record_expert_load(model) as load, record_pathways(model) as pathways:
        model(**batch)
    num_image = int((batch["input_ids"] == IMAGE_TOKEN).sum())
    expected = {"image": num_image, "text": int(batch["attention_mask"].sum()) - num_image}
    for group, num_tokens in expected.items():
        for counts in load.by_router(token_group=group).values():
            assert min(counts) >= 0 and sum(counts) == num_tokens
    assert pathways.expert_load().by_router() == load.by_router()


def test_generation_of_a_clustered_llava_is_recorded():
    torch.manual_seed(0)
    target = r".*language_model.*(gate|up|down)_proj"
    config = MoCLEConfig(num_experts=3, num_clusters=3, target_modules=target, init_lora_weights=False)
    model = get_peft_model(tiny_llava(), config).eval()
    batch = image_batch()
    with torch.no_grad(), record_expert_load(model) as load:
        model.generate(**batch, cluster_ids=torch.tensor([0, 2]), max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert load.counts and all(int(counts.min()) >= 0 for counts in load.counts.values())
