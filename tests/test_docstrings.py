"""The examples in docstrings run: on their own, or with stand-ins for what they leave to the reader."""

from __future__ import annotations

import doctest
import importlib
import io
import pkgutil
from functools import partial
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import peft_moe
from peft_moe import (
    InstructionClusterer,
    MoCLEConfig,
    MoLEConfig,
    export_all,
    record_expert_load,
)
from peft_moe.monitoring import record_pathways
from peft_moe.tuners.mocle.encoder import SentenceEncoder
from peft_moe.tuners.mocle.instructions import instruction_text
from tiny_models import tiny_llama, tiny_tokenizer, token_batch
from tiny_moe import FAMILIES, image_batch, tiny_moe_llava
from tuners.tiny_encoder import TEXTS, write_tiny_encoder


NOT_RUN = {
    "peft_moe.models.moe_llava.convert_original.convert": "needs an original checkpoint of MoE-LLaVA",
    "peft_moe.metrics": "a script for `evaluate.load`, which tests/metrics runs",
    "peft_moe.kernels.triton": "its programs need a compiler",
}


def examples():
    """Every docstring with an example, by name."""
    found = {}
    for info in pkgutil.walk_packages(peft_moe.__path__, "peft_moe."):
        if not info.name.startswith(tuple(NOT_RUN)):
            module = importlib.import_module(info.name)
            tests = doctest.DocTestFinder(exclude_empty=True).find(module, info.name)
            found.update({test.name: test for test in tests if test.examples and test.name not in NOT_RUN})
    return found


EXAMPLES = examples()


def mole():
    return get_peft_model(tiny_llama(), MoLEConfig(r=2, task_type="CAUSAL_LM"))


def mocle(**settings):
    clusterer = InstructionClusterer(torch.eye(5, 8), encoder="somewhere")
    return get_peft_model(tiny_llama(), MoCLEConfig.from_clusterer(clusterer, r=2, task_type="CAUSAL_LM", **settings))


def for_trainer(model):
    rows = [{name: value[0] for name, value in token_batch(num_padding=0, seed=i).items()} for i in range(4)]
    args = TrainingArguments("out", max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True)
    names = {"Trainer": Trainer, "model": model, "args": args, "train_dataset": rows, "train_set": rows}
    return {**names, "torch": torch}


def recorded():
    model, pictures = tiny_moe_llava(), image_batch()
    with record_expert_load(model) as load, record_pathways(model) as pathways:
        model(**pictures)
    return {"load": load, "pathways": pathways, "model": model, "batch": pictures}


def with_encoder():
    encoder = SentenceEncoder(write_tiny_encoder(Path("encoder")), device="cpu")
    names = {"encoder": encoder, "dataset": Dataset.from_dict({"prompt": TEXTS}), "model": tiny_llama()}
    return {**names, "InstructionClusterer": InstructionClusterer}


def with_adapters():
    class Encoder(SentenceEncoder):
        embedding_dim = 8

        def encode(self, texts, **options):
            return torch.eye(5, 8)[[4] * len(texts)]

    export_all(mocle(), "adapters")
    return {"encoder": Encoder("somewhere")}


def saved_adapter():
    """An adapter whose base model and encoder lie beside it, as the Hub would have them."""
    from peft import AutoPeftModelForCausalLM
    from transformers import pipeline

    encoder = write_tiny_encoder(Path("encoder"))
    tiny_llama().save_pretrained("base")
    tiny_tokenizer().save_pretrained("base")
    base = AutoModelForCausalLM.from_pretrained("base")
    clusterer = InstructionClusterer.fit(TEXTS, 3, encoder=encoder, show_progress=False)
    get_peft_model(base, MoCLEConfig.from_clusterer(clusterer, r=2)).save_pretrained("adapter")
    return {
        "AutoPeftModelForCausalLM": AutoPeftModelForCausalLM,
        "pipeline": partial(pipeline, max_new_tokens=2),
        "tokenizer": tiny_tokenizer(),
    }


def for_sft():
    rows = Dataset.from_list([{"input_ids": [3, 4, 5], "cluster_ids": 1}] * 4)
    return {"tokenizer": tiny_tokenizer(), "model": mocle(), "dataset": rows}


def with_chats():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}w1 {{ m['role'][0] }} w3 {{ m['content'] }} w2 {% endfor %}"
    return {
        "tokenizer": tokenizer,
        "chats": [[{"role": "user", "content": "a b"}], [{"role": "user", "content": "c"}]],
    }


def moe():
    rows = Dataset.from_list([{"input_ids": row} for row in token_batch(8)["input_ids"].tolist()])
    model = FAMILIES[0].build(num_hidden_layers=12, num_local_experts=8)
    return {"model": model, "tokenizer": tiny_tokenizer(), "train_set": rows, "probe_set": rows}


def with_report():
    from peft_moe import Extender

    names = moe()
    report = Extender(names["model"], names["tokenizer"]).measure(names["train_set"], names["probe_set"], steps=1)
    return {**names, "report": report, "get_peft_model": get_peft_model}


def dense_llava():
    from models.tiny_llava import tiny_llava

    llava = tiny_llava()
    llava.save_pretrained("dense")
    return {"llava": llava}


ENCODER = {"num_clusters=64": "num_clusters=3, encoder=encoder", "choice.best)": "choice.best, encoder=encoder)"}
# what the reader has, and what stands in the place of something that has to be downloaded
STAND_INS = {
    "get_aux_loss": lambda: {"model": mole(), "batch": token_batch(), "my_loss": lambda logits, _: logits.sum()},
    "find_intact_checkpoint": lambda: for_trainer(mole()),
    "ExpertLoadCallback": lambda: for_trainer(mole()),
    "router_parameter_groups": lambda: for_trainer(mole()),
    "MoeTuningStage": lambda: {
        **for_trainer(tiny_moe_llava()),
        "train_set": [{name: value[0] for name, value in image_batch().items()}] * 4,
    },
    "explain_ffn_experts": lambda: {"model": FAMILIES[0].build(experts_implementation="peft_moe")},
    "MoeLlavaForConditionalGeneration": (dense_llava, {"llava-hf/llava-1.5-7b-hf": "dense"}),
    "from_dense": dense_llava,
    "record_expert_load": recorded,
    "record_pathways": recorded,
    "plot_expert_load": recorded,
    "expert_load_report": recorded,
    "modality_report": recorded,
    "pathways_report": recorded,
    "MoLEConfig": lambda: {"model": tiny_llama()},
    "MoCLEConfig": (with_encoder, ENCODER),
    "InstructionClusterer": (with_encoder, ENCODER),
    "choose_num_clusters": (with_encoder, {"(4, 16, 64)": "(2, 3), encoder=encoder", **ENCODER}),
    "SentenceEncoder": (with_encoder, {"sentence-transformers/all-MiniLM-L6-v2": "encoder", "384": "32"}),
    "export_all": lambda: {"model": mocle(), "export_all": export_all},
    "export_cluster_lora": lambda: {"model": mocle(), "base_model": tiny_llama()},
    "attach_encoder": (saved_adapter, {"me/my-mocle-adapter": "adapter", "What colour is the sky?": "a b"}),
    "ClusterIdsCollator": (
        for_sft,
        {
            '("out",': '("out", bf16=False, use_cpu=True, report_to="none",',
            "data_collator=collator": "data_collator=collator, processing_class=tokenizer",
        },
    ),
    "ClusterAdapterRouter": (with_adapters, {'("adapters")': '("adapters", encoder=encoder)'}),
    "PromptReader": lambda: {**with_chats(), "instruction_text": instruction_text},
    "MoExtendConfig": moe,
    "Extender": (moe, {"steps=1000": "steps=2"}),
    "choose_layers": with_report,
}


class Checker(doctest.OutputChecker):
    """What an example shows has to come; where it shows nothing, anything may."""

    def check_output(self, want, got, options):
        want = want.replace("```\n", "")
        return not want.strip() or super().check_output(want, got, options)


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    test = EXAMPLES[name]
    stand_ins = STAND_INS.get(name.rpartition(".")[2], dict)
    make, replacements = stand_ins if isinstance(stand_ins, tuple) else (stand_ins, {})
    test.globs.update(make())
    for example in test.examples:
        for text, replacement in replacements.items():
            example.source = example.source.replace(text, replacement)
            example.want = example.want.replace(text, replacement)
    said = io.StringIO()
    runner = doctest.DocTestRunner(Checker(), verbose=False, optionflags=doctest.ELLIPSIS)
    runner.run(test, out=said.write, clear_globs=False)
    assert not runner.failures, said.getvalue()
