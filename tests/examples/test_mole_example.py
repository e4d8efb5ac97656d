"""The MoLE examples run from end to end in a small form: a tiny model with the tokenizer of the real one."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from running import ENVIRONMENT, EXAMPLES, run


pytestmark = pytest.mark.slow
SIZE = ["--steps", "12", "--batch_size", "2", "--rows", "8", "--eval_rows", "2"]


def demo_command(model: Path, output: Path) -> list[str]:
    return ["mole/demo.py", "--model_name_or_path", str(model), "--output_dir", str(output), *SIZE]


def test_demo_goes_on_where_it_was_killed(tiny_model, tmp_path):
    output = tmp_path / "demo"
    checkpoint = output / "checkpoints" / "checkpoint-8" / "trainer_state.json"
    script, *arguments = demo_command(tiny_model, output)
    command = [sys.executable, str(EXAMPLES / script), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT)
    deadline = time.monotonic() + 300
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert checkpoint.exists()
    before = json.loads((output / "report.json").read_text())["before"]
    printed = run(*demo_command(tiny_model, output)).stdout
    report = json.loads((output / "report.json").read_text())
    assert report["before"] == before
    assert report["reload_is_bit_equal"] is True
    assert report["after"]["answer_nll"] != before["answer_nll"]
    assert (output / "adapter" / "adapter_model.safetensors").exists()
    assert (output / "expert_load.png").stat().st_size > 10_000
    assert "bit-equal logits in a new process" in printed


def test_other_settings_do_not_mix_with_an_earlier_run(tiny_model, tmp_path):
    (tmp_path / "report.json").write_text(json.dumps({"settings": {"steps": 1}}))
    result = run(*demo_command(tiny_model, tmp_path), check=False)
    assert result.returncode != 0
    assert "use --restart" in result.stderr


def test_training_script_writes_an_adapter(tiny_model, tmp_path):
    run("mole/train.py", "--model_name_or_path", tiny_model, "--output_dir", tmp_path, "--max_steps", 2)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "MOLE"
    assert config["base_model_name_or_path"] == str(tiny_model)
