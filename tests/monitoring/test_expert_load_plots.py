"""Heat maps and markdown reports show what was counted, and errors say what to install or do."""

from __future__ import annotations

import sys

import pytest
from monitored import check_picture, load_of

from peft_moe.monitoring import ExpertLoad, expert_load_report, plot_expert_load
from peft_moe.monitoring.report import router_labels


@pytest.fixture
def load() -> ExpertLoad:
    return load_of(
        {
            ("default", f"model.layers.{layer}.mlp", domain, group): [10 * (layer + 1), 40, 50 + offset, 0]
            for layer in range(3)
            for domain, offset in (("chess", 0), ("go", 30))
            for group in ("text", "image")
        }
    )


@pytest.mark.parametrize(("by", "panels"), [("domain", ["chess", "go"]), ("token_group", ["text", "image"])])
def test_png_shows_one_panel_each_on_one_colour_scale(tmp_path, load, by, panels):
    pytest.importorskip("matplotlib")
    figure = plot_expert_load(load, tmp_path / "load.png", by=by)
    images = [axis.images[0] for axis in figure.axes if axis.images]
    assert [axis.get_title() for axis in figure.axes if axis.images] == panels
    assert len({image.get_clim() for image in images}) == 1
    assert images[0].get_clim()[0] == 0
    shares = images[0].get_array()[2].tolist()
    expected = load.split(by)[panels[0]]["model.layers.2.mlp"]
    assert shares == pytest.approx([count / sum(expected) for count in expected])
    check_picture(tmp_path / "load.png")


def test_layers_of_other_widths_leave_grey_cells():
    pytest.importorskip("matplotlib")
    load = load_of({("default", f"layers.{i}.mlp", "all", "all"): c for i, c in enumerate([[3, 1], [1, 1, 1, 1]])})
    (axis, *_) = plot_expert_load(load).axes
    assert axis.images[0].get_array().mask.tolist() == [[False, False, True, True], [False] * 4]


def test_many_panels_and_experts_are_drawn():
    pytest.importorskip("matplotlib")
    names = [("default", f"layers.{i}.mlp", f"domain {d}", "all") for i in range(60) for d in range(6)]
    load = load_of({name: list(range(64)) for name in names})
    figure = plot_expert_load(load)
    assert sum(bool(axis.images) and axis.get_visible() for axis in figure.axes) == 6


def test_missing_matplotlib_names_the_extra(monkeypatch, load):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install peft-moe\[plots\]"):
        plot_expert_load(load)


def test_report_has_one_table_per_domain(load):
    report = expert_load_report(load)
    lines = report.splitlines()
    header = ["domain", "load entropy (1 = balanced)", "largest share", "dead experts"]
    assert [cell.strip() for cell in lines[0].split("|")[1:-1]] == header
    assert lines[2].split("|")[4].strip() == "3 of 12"
    assert report.count("Share of the choices of each router, domain **") == 2
    # layer 2 of chess: 30, 40, 50, 0 for text and as much for images
    row = next(line for line in lines if line.startswith("| 2 "))
    assert [cell.strip() for cell in row.split("|")[1:-1]] == ["2", "25.0%", "33.3%", "41.7%", "0.0%", "240"]


def test_report_and_plot_can_be_split_by_token_group_only_or_by_domain(load):
    assert "token group **image**" in expert_load_report(load, by="token_group")
    with pytest.raises(ValueError, match="not by 'layer'"):
        expert_load_report(load, by="layer")


@pytest.mark.parametrize("draw", [expert_load_report, plot_expert_load])
def test_nothing_counted_is_an_error(draw):
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="no forward pass was counted"):
        draw(ExpertLoad())


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        pytest.param(["model.layers.0.mlp", "model.layers.10.mlp"], ["0", "10"], id="layers"),
        pytest.param(["layers.0.mlp"], ["layers.0.mlp"], id="one"),
        pytest.param(["l.0.mlp.up", "l.0.mlp.down"], ["up", "down"], id="linears"),
        pytest.param(["encoder.0.mlp", "decoder.0.mlp"], ["encoder", "decoder"], id="encoder-decoder"),
        pytest.param([], [], id="none"),
    ],
)
def test_router_labels_leave_out_what_all_names_share(names, labels):
    assert router_labels(names) == labels
