"""The program at the top of the README runs, trains, pushes, and what it pushed loads elsewhere."""

from __future__ import annotations

import pytest
from hub_process import run_script
from hub_server import HubServer


@pytest.mark.slow
def test_the_program_of_the_readme_runs(tmp_path):
    with HubServer() as hub:
        trained = run_script(hub, "run_readme.py", tmp_path, tmp_path / "home")
        loaded = run_script(hub, "load_readme.py", tmp_path, tmp_path / "other_home")
        assert hub.unhandled == []
        assert "adapter_model.safetensors" in hub.files("my-name/my-adapter")
        assert b"import peft_moe" in hub.read("my-name/my-adapter", "README.md")
    assert trained["trained"] == trained["parameters"] > 0
    assert loaded["loaded"] == "equal"
