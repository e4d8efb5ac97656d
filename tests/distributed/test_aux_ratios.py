"""The table of `docs/howto/scale.md` is what `aux_ratios.py` measured; its rows on trl's DPO and GRPO still hold."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch


MEASURED = Path(__file__).with_name("aux_ratios.json")
PAGE = Path(__file__).parents[2] / "docs/howto/scale.md"


def test_the_table_of_the_docs_is_what_was_measured():
    rows = json.loads(MEASURED.read_text())["rows"]
    _, _, after = PAGE.read_text().partition("| loop | setting | measured / computed by hand |\n|---|---|---|\n")
    table = re.match(r"(?:\|.*\n)*", after).group()
    assert table == "".join(f"| {row['loop']} | {row['setting']} | {row['ratio']:.3f} |\n" for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpo", "grpo"])
@pytest.mark.parametrize("accumulation", [1, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_each_pass_under_trl_weighs_one(tmp_path, name, accumulation):
    pytest.importorskip("trl", reason="trl is not installed")
    import aux_ratios

    make = getattr(aux_ratios, name)(str(tmp_path), gradient_accumulation_steps=accumulation)
    found, expected = aux_ratios.outside(make)
    assert expected.norm() > 1e-3
    assert aux_ratios.norm_ratio(found, expected) == pytest.approx(1.0, abs=0.01)
    assert torch.nn.functional.cosine_similarity(found, expected, dim=0) > 0.999
