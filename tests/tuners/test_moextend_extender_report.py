"""Counts before and after give the shift of each layer, and the shift gives the configuration."""

from __future__ import annotations

import numpy as np
import pytest

from peft_moe import ExtenderReport, MoExtendConfig
from peft_moe.tuners.moextend import selection_shift


def test_the_shift_is_the_standard_deviation_of_the_change_of_shares():
    shift = selection_shift({3: [6, 2], 5: [1, 1, 2], 8: [5, 5]}, {3: [2, 6], 5: [10, 10, 20], 8: [2, 0]})
    # 3: ±0.5; 5: twice the same shares; 8: ±0.5
    assert shift == pytest.approx({3: 0.5, 5: 0.0, 8: 0.5})
    before, after = np.array([7, 1, 3, 9]), np.array([4, 4, 1, 2])
    expected = np.std(before / before.sum() - after / after.sum())
    assert selection_shift({0: before.tolist()}, {0: after.tolist()})[0] == pytest.approx(expected)
    assert selection_shift({0: [0, 4, 0, 0]}, {0: [4, 0, 0, 0]})[0] == pytest.approx((2 / 4) ** 0.5)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ({0: [1, 1]}, {1: [1, 1]}, r"same layers.*\[0\] and \[1\]"),
        ({0: [1, 1]}, {0: [1, 1, 1]}, "Layer 0 needs counts of the same experts twice"),
        ({0: [0, 0]}, {0: [1, 1]}, "at least one choice each"),
    ],
)
def test_counts_that_cannot_be_compared_are_refused(before, after, message):
    with pytest.raises(ValueError, match=message):
        selection_shift(before, after)


def report_of(before: dict[int, list[int]], after: dict[int, list[int]]) -> ExtenderReport:
    blocks = {layer: f"model.layers.{layer}.mlp" for layer in before}
    return ExtenderReport(before, after, blocks, num_probe_tokens=8, losses=[1.5], settings={"steps": 2})


FOUR = report_of(
    {1: [8, 0, 0], 2: [1, 5, 2], 4: [2, 2, 4], 6: [0, 3, 5]}, {1: [8, 0, 0], 2: [1, 6, 1], 4: [4, 2, 2], 6: [5, 3, 0]}
)


def test_the_layers_that_shifted_most_are_chosen_with_the_most_used_experts():
    config = FOUR.choose_layers(task_type="CAUSAL_LM", expert_type="lora")
    assert FOUR.ranking == [6, 4, 2, 1]
    assert isinstance(config, MoExtendConfig)
    assert (config.layers, config.copy_sources) == ([4, 6], {4: 2, 6: 2})
    assert (config.num_new_experts, config.task_type, config.expert_type) == (1, "CAUSAL_LM", "lora")
    assert FOUR.choose_layers(copy_source="tuned").copy_sources == {4: 0, 6: 0}
    several = FOUR.choose_layers(p=0.25, num_new_experts=4)
    assert (several.layers, several.copy_sources) == ([6], {6: [2, 1, 0, 2]})


def test_sources_are_known_for_layers_that_somebody_else_has_chosen():
    assert FOUR.copy_sources([1, 2]) == {1: 0, 2: 1}
    assert FOUR.copy_sources([4], num_new_experts=2, copy_source="tuned") == {4: [0, 1]}
    with pytest.raises(ValueError, match=r"Layers \[0\] were not measured. Those that were: \[1, 2, 4, 6\]"):
        FOUR.copy_sources([0, 1])


def test_the_share_of_layers_is_rounded_down():
    hundred = report_of({n: [4, 0] for n in range(100)}, {n: [3, 1] for n in range(100)})
    # 0.29 · 100 is 28.999999999999996 in floating point
    assert hundred.choose_layers(0.29).layers == list(range(29))
    assert len(hundred.choose_layers(0.019).layers) == 1
    assert len(hundred.choose_layers(1).layers) == 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"p": 0}, r"p is the share of the layers.*in \(0, 1\], but is 0"),
        ({"p": 1.1}, "but is 1.1"),
        ({"p": True}, "but is True"),
        ({"p": 0.2}, "p=0.2 of 4 layers with experts is none. It must be at least 0.25"),
        ({"copy_source": "best"}, r"copy_source must be one of \('original', 'tuned'\), but is 'best'"),
        ({"layers": [1]}, r"finds \['layers'\] itself"),
        ({"num_new_experts": 0}, "num_new_experts must be a whole number of at least 1, but is 0"),
        ({"init": "noise"}, "init must be one of"),
    ],
)
def test_a_choice_that_makes_no_sense_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        FOUR.choose_layers(**arguments)


def test_there_is_no_ranking_of_layers_that_stood_still():
    with pytest.raises(ValueError, match="No layer chose other experts after tuning"):
        report_of({0: [1, 3], 1: [2, 2]}, {0: [1, 3], 1: [2, 2]}).choose_layers()


def test_a_report_survives_a_file_and_is_drawn(tmp_path):
    FOUR.save(tmp_path / "report.json")
    assert ExtenderReport.from_file(tmp_path / "report.json") == FOUR
    assert "steps=2" in str(FOUR)
    cells = [cell.strip() for cell in str(FOUR).splitlines()[-1].split("|")]
    assert cells[1:-1] == ["6", "1", "0.5103", "2 (62.5%)", "0 (62.5%)", "0 (+62.5 points)"]
    figure = FOUR.plot(tmp_path / "shift.png", p=0.5)
    assert (tmp_path / "shift.png").read_bytes().startswith(b"\x89PNG")
    assert [bar.get_width() for bar in figure.axes[1].patches] == pytest.approx(list(FOUR.shift.values()))
    with pytest.raises(ValueError, match="no ExtenderReport of format 1: its format is 7"):
        ExtenderReport.from_dict({"format": 7})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "Expecting value"),
        ("[]", "no ExtenderReport of format 1: its format is None"),
        ('{"format": 1}', "damaged .KeyError: 'layers'."),
        ('{"format": 1, "layers": []}', "damaged .AttributeError"),
        ('{"format": 1, "layers": {"x": {}}}', "damaged .ValueError"),
        ("[" * 100_000, "recursion"),
    ],
    ids=["empty", "list", "no-layers", "layers-in-a-list", "layer-in-words", "bottomless"],
)
def test_a_file_that_is_no_report_is_named(content, message, tmp_path):
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(ValueError, match=f"report.json' cannot be read as an ExtenderReport: .*{message}"):
        ExtenderReport.from_file(tmp_path / "report.json")


def test_counts_of_other_layers_or_experts_are_no_report():
    table = FOUR.to_dict()
    layer = next(iter(table["layers"]))
    table["layers"][layer] = {**table["layers"][layer], "after": [1]}
    with pytest.raises(ValueError, match="damaged .ValueError"):
        ExtenderReport.from_dict(table)
