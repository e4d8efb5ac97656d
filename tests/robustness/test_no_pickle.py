"""The package writes no pickle and reads one kind only; one that is put in the place of its files does not run."""

from __future__ import annotations

import io
import json
import pickle
import re
import tokenize
from pathlib import Path

import pytest
import torch
from peft import PeftModel

import peft_moe
from conformance.tuner_cases import CASES
from peft_moe import (
    ClusterAdapterRouter,
    ExtenderReport,
    InstructionClusterer,
    MoCLEConfig,
    MoExtendConfig,
    MoLEConfig,
)
from peft_moe.models.moe_llava.convert_original import convert


PACKAGE = Path(peft_moe.__file__).parent
FORBIDDEN = re.compile(
    r"\b(c?pickle|_pickle|cloudpickle|dill|joblib|marshal|shelve|skops)\b|\b(read|to)_pickle\b|\ballow_pickle\b"
    r"|\btorch \. (load|save|package|hub|jit \. load|serialization)\b"
    r"|\bfrom torch(?: \. \w+)* import .*(\b(load|save|hub)\b|\*)"
    # between processes: `all_gather_object`, `broadcast_object_list`, ...
    r"|\b(gather|all_gather|broadcast|scatter|send|recv)_object(_list)?\b|\bload_state_dict_from_url\b"
    r"|\btrust_remote_code = (?!False)|(?<!\. )\b(eval|exec|__import__)\b|\bbuiltins\b"
)
NO_CODE = (tokenize.STRING, tokenize.COMMENT)


def offences(source: str) -> list[str]:
    """Every line, with blanks between its tokens, that reads or writes a pickle, or runs what it has read."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    code = " ".join(token.string for token in tokens if token.type not in NO_CODE)
    return [line.strip() for line in code.splitlines() if FORBIDDEN.search(line)]


def test_no_module_reads_or_writes_a_pickle_but_the_one_that_converts_original_checkpoints():
    found = {path: offences(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}
    assert len(found) > 50
    found = {path.relative_to(PACKAGE).as_posix(): lines for path, lines in found.items() if lines}
    (line,) = found.pop("models/moe_llava/convert_original.py")
    assert not found
    assert "weights_only = True" in line and line.count("torch . load") == 1


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "import sklearn.externals.joblib as j",
        "from torch import load",
        "from torch import *",
        "from torch import serialization, save as s",
        "torch.load(f)",
        "read = torch.load",
        "torch.serialization.load(f)",
        "torch.hub.load_state_dict_from_url(url)",
        "torch.save(x, f)",
        "np.load(f, allow_pickle=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=flag)",
        "frame.read_pickle(f)",
        "dist.all_gather_object(found, value)",
        "dist.broadcast_object_list(values)",
        "eval(text)",
        "map(exec, texts)",
    ],
)
def test_offences_are_seen(source):
    assert offences(source)
    assert not offences(f"# {source}\nmodel.eval()\njson.load(f)\nmodel.save('{source}')")


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture(params=["bare", "archive", "in-a-state-dict"])
def hostile(request, tmp_path) -> bytes:
    """A pickle that runs code, alone or as `torch.save` writes it."""
    evil = Evil(tmp_path / "pwned")
    if request.param == "bare":
        return pickle.dumps(evil)
    content = io.BytesIO()
    torch.save({"weight": evil} if request.param == "in-a-state-dict" else evil, content)
    return content.getvalue()


@pytest.fixture(autouse=True)
def _nothing_runs(tmp_path):
    yield
    assert not (tmp_path / "pwned").exists()


def test_it_would_run(tmp_path):
    pickle.loads(pickle.dumps(Evil(tmp_path / "pwned")))
    assert (tmp_path / "pwned").exists()
    (tmp_path / "pwned").unlink()


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.safetensors", "adapter_config.json"])
@pytest.mark.parametrize(
    "case", list({case.tuner: case for case in reversed(CASES)}.values()), ids=lambda case: case.tuner
)
def test_in_place_of_an_adapter(case, name, hostile, tmp_path):
    folder = tmp_path / "adapter"
    case.wrap().save_pretrained(folder)
    if name == "adapter_model.bin":
        (folder / "adapter_model.safetensors").unlink()
    (folder / name).write_bytes(hostile)
    with pytest.raises(Exception, match="(?i)header|weights only load failed|codec|expecting value"):
        PeftModel.from_pretrained(case.model(), str(folder))


@pytest.mark.parametrize("config", [MoLEConfig, MoCLEConfig, MoExtendConfig])
def test_in_place_of_a_configuration(config, hostile, tmp_path):
    (tmp_path / "adapter_config.json").write_bytes(hostile)
    with pytest.raises(ValueError, match="codec|Expecting value"):
        config.from_pretrained(str(tmp_path))


@pytest.mark.parametrize("name", ["clusterer.safetensors", "clusterer_config.json"])
def test_in_place_of_a_clusterer(name, hostile, tmp_path):
    folder = tmp_path / "clusters"
    InstructionClusterer(torch.eye(3, 5), encoder="an/encoder").save_pretrained(folder)
    (folder / name).write_bytes(hostile)
    with pytest.raises(ValueError, match="is damaged or does not belong to.*Nothing was loaded"):
        InstructionClusterer.from_pretrained(str(folder))


def test_in_place_of_the_table_of_exported_adapters(hostile, tmp_path):
    (tmp_path / "clusters.json").write_bytes(hostile)
    with pytest.raises(ValueError, match="clusters.json in .* is damaged"):
        ClusterAdapterRouter.from_pretrained(str(tmp_path))


def test_in_place_of_an_extender_report(hostile, tmp_path):
    (tmp_path / "report.json").write_bytes(hostile)
    with pytest.raises(ValueError, match="report.json' cannot be read as an ExtenderReport"):
        ExtenderReport.from_file(tmp_path / "report.json")


def test_in_place_of_an_original_checkpoint(hostile, tmp_path):
    source = tmp_path / "original"
    source.mkdir()
    config = {"model_type": "moe_llava_llama", "moe": {"num_experts": [4]}, "image_projector_type": "mlp2x_gelu"}
    (source / "config.json").write_text(json.dumps({**config, "mm_image_tower": "a/tower"}))
    (source / "pytorch_model.bin").write_bytes(hostile)
    with pytest.raises((pickle.UnpicklingError, RuntimeError), match="(?i)weights only load failed|mmap can only be"):
        convert(source, tmp_path / "converted")
