"""More of what `test_round_trips.py` shows: every configuration, training from the Hub, a Hub that is away."""

from __future__ import annotations

from typing import Any

import pytest
from hub_process import run_script

from conformance.tuner_cases import every_tuner


pytestmark = [pytest.mark.slow, pytest.mark.exhaustive]


@pytest.fixture(scope="module")
def results(hub, tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("shared")
    pushed = run_script(hub, "push_more.py", folder, tmp_path_factory.mktemp("home"))
    return {**pushed, **run_script(hub, "load_more.py", folder, tmp_path_factory.mktemp("home"))}


@every_tuner
def test_every_configuration_computes_the_same(case, results):
    assert results[case.name] == "equal"


def test_training_goes_on_from_a_checkpoint_on_the_hub(results):
    assert results["resumed"] == "equal"


def test_a_model_in_shards_computes_the_same(hub, results):
    assert sum(name.endswith(".safetensors") for name in hub.files("someone/shards")) > 1
    assert results["shards"] == "equal"


def test_a_download_that_is_cut_off_once_is_repeated(results):
    assert results["download cut off once"] == "equal"


def test_a_hub_that_stays_away_is_an_error_and_nothing_is_visible(hub, results):
    assert results["away"]["error"] != "no error"
    assert not results["away"]["moved"]
    assert hub.files("someone/away") == set()
