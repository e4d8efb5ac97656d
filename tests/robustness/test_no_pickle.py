"""The package writes no pickle and reads one kind only; one that is put in the place of its files does not run."""

from __future__ import annotations

import ast
import io
import json
import pickle
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from trained import Evil

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
    r"(.*\.)?(_?pickle|cPickle|cloudpickle|dill|joblib|marshal|shelve|skops)(\..*)?"
    r"|(.*\.)?(read_pickle|to_pickle|load_module|load_state_dict_from_url)"
    # between processes: `all_gather_object`, `broadcast_object_list`, ...
    r"|(.*\.)?(all_gather|gather|broadcast|scatter|send|recv)_object(_list)?"
    r"|torch\.(serialization\.)?(load|save)|torch\.(hub|jit)\.load|torch\.package(\..*)?"
    r"|yaml\.load|eval|exec|__import__|[^.]*\.\*"
)
SAFE_LOAD = "torch.load with weights_only=True"


def imports(tree: ast.AST) -> list[tuple[str, str]]:
    """What a module calls the things that it imports, and what they are."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            start = "" if isinstance(node, ast.Import) else "." * node.level + f"{node.module or ''}."
            found += [(alias.asname or alias.name, f"{start}{alias.name}") for alias in node.names]
    return found


def dotted(node: ast.AST, names: dict[str, str]) -> str:
    """The name of what a node refers to, as it would be imported."""
    if isinstance(node, ast.Attribute):
        found = f"{dotted(node.value, names)}.{node.attr}"
    elif isinstance(node, ast.Call) and dotted(node.func, names) == "getattr" and len(node.args) > 1:
        found = f"{dotted(node.args[0], names)}.{getattr(node.args[1], 'value', '?')}"
    else:
        found = names.get(node.id, node.id) if isinstance(node, ast.Name) else "?"
    return found.removeprefix("builtins.")


def offences(source: str) -> list[str]:
    """Every way in which a module reads or writes a pickle, or runs what it has read; and `SAFE_LOAD`."""
    tree = ast.parse(source)
    imported = imports(tree)
    names, safe, found = dict(imported), set(), [name for _, name in imported if FORBIDDEN.fullmatch(name)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            keywords = {keyword.arg: getattr(keyword.value, "value", "?") for keyword in node.keywords}
            name = dotted(node.func, names)
            if name in ("torch.load", "torch.serialization.load") and keywords.get("weights_only") is True:
                found.append(SAFE_LOAD)
                safe.add(node.func)
            if name == "importlib.import_module" and FORBIDDEN.fullmatch(str(getattr(node.args[0], "value", ""))):
                found.append(name)
            found += [key for key in ("allow_pickle", "trust_remote_code") if keywords.get(key, False) is not False]
        # a function that is handed on is as good as one that is called
        if isinstance(node, (ast.Name, ast.Attribute, ast.Call)) and node not in safe:
            found += [name for name in [dotted(node, names)] if FORBIDDEN.fullmatch(name)]
    return found


def test_no_module_reads_or_writes_a_pickle_but_the_one_that_converts_original_checkpoints():
    found = {path: offences(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}
    assert len(found) > 50
    found = {path.relative_to(PACKAGE).as_posix(): names for path, names in found.items() if names}
    assert found == {"models/moe_llava/convert_original.py": [SAFE_LOAD]}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "import sklearn.externals.joblib as j",
        "importlib.import_module('pickle')",
        "from importlib import import_module as load\nload('dill.source')",
        "from torch import load",
        "from torch import *",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "torch.load(f, weights_only=flag)",
        "torch.load(f, **options)",
        "read = torch.load",
        "getattr(torch, 'load')(f)",
        "import torch as t\nt.load(f)",
        "from torch import serialization as s\ns.load(f)",
        "torch.serialization.load(f)",
        "torch.serialization.pickle.load(f)",
        "torch.hub.load_state_dict_from_url(url)",
        "from torch.hub import load_state_dict_from_url",
        "torch.package.PackageImporter(f)",
        "torch.save(x, f)",
        "np.load(f, allow_pickle=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=flag)",
        "frame.read_pickle(f)",
        "dist.all_gather_object(found, value)",
        "dist.broadcast_object_list(values)",
        "from accelerate.utils import gather_object",
        "eval(text)",
        "import builtins as b\nb.eval(text)",
        "map(exec, texts)",
    ],
)
def test_offences_are_seen(source):
    assert set(offences(source)) - {SAFE_LOAD}


def test_other_code_is_none():
    source = "model.eval()\njson.load(f)\nmodel.save('torch.save')\ndist.all_gather(found, value)  # eval(x)"
    assert offences(f"from .package import load\nload(f)\nimportlib.import_module(name)\n{source}") == []


def test_a_safe_load_is_seen_as_one():
    assert offences("import torch as t\nt.load(f, weights_only=True)") == [SAFE_LOAD]


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
