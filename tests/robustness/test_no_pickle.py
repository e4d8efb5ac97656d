"""The package neither reads nor writes pickles, and one that is put in the place of its files does not run."""

from __future__ import annotations

import ast
import io
import json
import pickle
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
MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "skops"}
CALLS = {
    "torch.save",
    "torch.jit.load",
    "torch.package",
    "pandas.read_pickle",
    "yaml.load",
    "eval",
    "exec",
    "__import__",
}


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def offences(source: str) -> list[str]:
    """Every way in which a module reads or writes a pickle, or runs what it has read."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [name for name in names if name in {"torch.load", "torch.save", "numpy.load", *CALLS}]
        else:
            names = []
        found += [name for name in names if MODULES & set(name.split("."))]
        if isinstance(node, ast.Call):
            name = dotted(node.func)
            keywords = {keyword.arg: getattr(keyword.value, "value", "?") for keyword in node.keywords}
            if name in CALLS or name.rpartition(".")[2] in {"read_pickle", "to_pickle", "load_module"}:
                found.append(name)
            if name == "torch.load" and keywords.get("weights_only") is not True:
                found.append("torch.load without weights_only=True")
            found += [key for key in ("allow_pickle", "trust_remote_code") if keywords.get(key, False) is not False]
    return found


def test_no_module_reads_or_writes_a_pickle():
    found = {path: offences(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}
    assert len(found) > 50
    assert {path.name: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "import sklearn.externals.joblib as j",
        "from torch import load",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "torch.load(f, weights_only=flag)",
        "torch.save(x, f)",
        "np.load(f, allow_pickle=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=flag)",
        "frame.read_pickle(f)",
        "eval(text)",
    ],
)
def test_offences_are_seen(source):
    assert offences(source)


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
    with pytest.raises(ValueError, match="is damaged or put together from two.*Nothing was loaded"):
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
