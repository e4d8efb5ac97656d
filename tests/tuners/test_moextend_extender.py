"""The Extender finds the layers whose choice of experts shifts, and leaves the model as it was, to the bit."""

from __future__ import annotations

import copy
import json
import os
import random
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_moextend_families import BY_NAME, config_for, every_family
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast, TrainingArguments

from peft_moe import Extender, ExtenderReport
from tiny_models import tiny_llama
from tiny_moe import NUM_EXPERTS, MoeFamily, image_batch, moe_batch, tiny_moe_llava


MIXTRAL = BY_NAME["mixtral"]


def rows_of(batch: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """A batch as a data set."""
    return [dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)]


TRAIN, PROBE = rows_of(moe_batch(8, seed=3)), rows_of(moe_batch(6, seed=4))


def quiet(folder, **settings) -> TrainingArguments:
    defaults = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "logging_steps": 1}
    return TrainingArguments(str(folder), **{**defaults, **settings})


def measure(model: nn.Module, folder, train_set=TRAIN, probe_set=PROBE, *, args=None, **settings) -> ExtenderReport:
    """Two steps with a learning rate that moves tiny routers."""
    defaults = {"steps": 2, "learning_rate": 0.05, "batch_size": 2}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Extender(model).measure(train_set, probe_set, args=args or quiet(folder), **{**defaults, **settings})


def state_of(model: nn.Module) -> dict:
    """Everything about a model that somebody could notice."""
    return {
        "tensors": {name: (t.data_ptr(), t.clone()) for name, t in model.state_dict(keep_vars=True).items()},
        "buffers": {name: (id(buffer), buffer.clone()) for name, buffer in model.named_buffers()},
        "gradients": {name: (p.requires_grad, id(p), id(p.grad)) for name, p in model.named_parameters()},
        "training": [module.training for module in model.modules()],
        "attributes": [
            {name: id(value) for name, value in m.__dict__.items() if name != "training"} for m in model.modules()
        ],
        "hooks": [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()],
        "config": copy.deepcopy(model.config.to_dict()),
        "use_cache": (getattr(model.config, "use_cache", None), model.generation_config.use_cache),
        "checkpointing": [getattr(module, "gradient_checkpointing", None) for module in model.modules()],
    }


def assert_same_state(found: dict, expected: dict) -> None:
    for kind in ("tensors", "buffers"):
        assert list(found[kind]) == list(expected[kind])
        for name, (identity, tensor) in found[kind].items():
            assert identity == expected[kind][name][0], name
            assert torch.equal(tensor, expected[kind][name][1]), name
    for kind in set(expected) - {"tensors", "buffers"}:
        assert found[kind] == expected[kind], kind


@every_family
def test_every_family_is_measured_and_left_as_it_was(family: MoeFamily, tmp_path):
    model = family.build()
    before = state_of(model)
    report = measure(model, tmp_path)
    assert_same_state(state_of(model), before)
    assert tuple(report.before) == tuple(report.after) == tuple(report.blocks) == family.moe_layers
    assert report.num_probe_tokens == 48
    assert all(sum(counts) == 96 for counts in [*report.before.values(), *report.after.values()])
    assert any(report.shift.values()) and len(report.losses) == 2
    sources = report.choose_layers(1.0, task_type="CAUSAL_LM").copy_sources
    assert all(report.before[layer][source] == max(report.before[layer]) for layer, source in sources.items())
    assert get_peft_model(model, report.choose_layers(1.0)) is not None


def test_counts_are_those_of_the_true_top_k_without_padding(tmp_path):
    model = MIXTRAL.build()
    batch = moe_batch(3, seed=7)
    batch["attention_mask"][0, 5:] = 0
    report = measure(model, tmp_path, probe_set=rows_of(batch), keep_tuned_router=True)
    is_counted = batch["attention_mask"].flatten().bool()
    assert report.num_probe_tokens == int(is_counted.sum()) == 21
    for counts, router_of in ((report.after, model), (report.before, MIXTRAL.build())):
        with torch.no_grad():
            logits = router_of(**batch, output_router_logits=True).router_logits
        for layer, of_layer in enumerate(logits):
            chosen = of_layer.topk(2).indices[is_counted]
            assert counts[layer] == torch.bincount(chosen.flatten(), minlength=NUM_EXPERTS).tolist()
    assert report.before != report.after


def with_equal_experts(*, but: int) -> nn.Module:
    """A Mixtral whose experts are all the same, except in one layer: only there the task tells the router anything."""
    model = MIXTRAL.build()
    for index, layer in enumerate(model.model.layers):
        for parameter in layer.mlp.experts.parameters():
            if index != but:
                parameter.data[:] = parameter.data[:1].clone()
            else:
                parameter.data.mul_(0.1)  # too little for the layers above to notice
    return model


def one_layer(folder, layer: int, coef: float) -> ExtenderReport:
    return measure(with_equal_experts(but=layer), folder, steps=8, learning_rate=0.1, router_aux_loss_coef=coef)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_the_only_layer_whose_router_can_learn_ranks_first(layer, tmp_path):
    report = one_layer(tmp_path, layer, 0.0)
    assert report.ranking[0] == layer
    assert report.shift[layer] > 0.05
    assert [shift for other, shift in report.shift.items() if other != layer] == [0, 0]
    assert report.choose_layers(0.34).layers == [layer]


def test_the_balance_loss_alone_shifts_layers_that_the_task_leaves_alone(tmp_path):
    drifted = one_layer(tmp_path, 2, 0.5)
    assert drifted.settings["router_aux_loss_coef"] == 0.5
    still = one_layer(tmp_path, 2, 0.0).shift
    assert still[0] == still[1] == 0
    assert drifted.shift[0] > 0 and drifted.shift[1] > 0


@pytest.mark.slow
def test_the_balance_loss_is_on_by_default_with_the_weight_of_the_configuration(tmp_path):
    model = MIXTRAL.build(router_aux_loss_coef=0.25)
    assert not model.config.output_router_logits
    default = measure(model, tmp_path)
    assert default.settings["router_aux_loss_coef"] == 0.25
    assert default.losses == measure(model, tmp_path, router_aux_loss_coef=0.25).losses
    off = measure(model, tmp_path, router_aux_loss_coef=0.0)
    assert 0.25 < default.losses[0] - off.losses[0] < 1
    assert measure(BY_NAME["deepseek_v3"].build(), tmp_path).settings["router_aux_loss_coef"] == 0
    with pytest.raises(ValueError, match="DeepseekV3ForCausalLM has no load-balancing loss of its own.*0.1"):
        measure(BY_NAME["deepseek_v3"].build(), tmp_path, router_aux_loss_coef=0.1)


def busy_model() -> nn.Module:
    """A model in the middle of something: mixed modes, gradients, hooks, checkpointing in one part."""
    model = BY_NAME["deepseek_v3"].build(attention_dropout=0.1)
    for layer in model.model.layers:
        layer.mlp.gate.e_score_correction_bias.normal_(std=0.1)
    model.model.layers[1].train()
    model.lm_head.requires_grad_(True)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    model.model.layers[0].mlp.gate.weight.requires_grad_(True)
    model.model.layers[0].mlp.gate.weight.grad = torch.ones_like(model.model.layers[0].mlp.gate.weight)
    model.model.layers[2].register_forward_hook(lambda *args: None)
    model.model.layers[0].gradient_checkpointing = True
    model.config.use_cache = True
    return model


class Breaks(Exception):
    """Raised on purpose."""


def collator_that(error: type[BaseException], after: int):
    """Works for some batches, then raises."""
    left = [after]

    def collate(rows):
        left[0] -= 1
        if left[0] < 0:
            raise error
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    return collate


# one batch is looked at, three are counted, then training begins
ENDINGS = {
    "well": (None, 0),
    "in the probe": (Breaks, 2),
    "in training": (Breaks, 5),
    "interrupted in training": (KeyboardInterrupt, 5),
    "in the second probe": (Breaks, 7),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_nothing_is_left_behind_however_it_ends(ending, tmp_path):
    error, after = ENDINGS[ending]
    model = busy_model()
    expected = state_of(model)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    settings = {"args": quiet(tmp_path, gradient_checkpointing=True, bf16=True), "router_aux_loss_coef": 0.0}
    if error is None:
        measure(model, tmp_path, **settings)
    else:
        with pytest.raises(error):
            measure(model, tmp_path, data_collator=collator_that(error, after), keep_tuned_router=True, **settings)
    assert_same_state(state_of(model), expected)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states


def test_tuned_routers_can_be_kept(tmp_path):
    model = MIXTRAL.build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = measure(model, tmp_path, keep_tuned_router=True)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {f"model.layers.{layer}.mlp.gate.weight" for layer in range(3)}
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())
    assert measure(model, tmp_path).before == report.after


def test_two_measurements_agree(tmp_path):
    first, second = (measure(MIXTRAL.build(), tmp_path) for _ in range(2))
    assert first == second


def test_a_model_of_pictures_and_text_is_measured(tmp_path):
    model = tiny_moe_llava()
    before = state_of(model)
    rows = rows_of(image_batch())
    report = measure(model, tmp_path, rows * 2, rows, router_aux_loss_coef=0.1)
    assert_same_state(state_of(model), before)
    assert list(report.before) == [0, 2]
    assert report.num_probe_tokens == 24
    assert any(report.shift.values())


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per letter."""
    vocabulary = {"<pad>": 0, **{letter: index for index, letter in enumerate("abcdefgh", start=3)}}
    letters = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    letters.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="<pad>")


def test_rows_of_unequal_length_are_padded_by_the_tokenizer(tokenizer, tmp_path):
    texts = ["a b c d", "e f", "g h a b c"]
    rows = [dict(tokenizer(text, return_token_type_ids=False)) for text in texts]
    labelled = [{**row, "labels": [-100, *row["input_ids"][1:]]} for row in rows]
    settings = {"steps": 1, "learning_rate": 0.05, "batch_size": 3, "args": quiet(tmp_path)}
    plain = Extender(MIXTRAL.build(), tokenizer).measure(rows, rows, **settings)
    answers = Extender(MIXTRAL.build(), tokenizer).measure(labelled, rows, **settings)
    assert plain.num_probe_tokens == answers.num_probe_tokens == 11
    assert plain.before == answers.before
    # the first token is never predicted, so both have the same labels
    assert plain.losses == pytest.approx(answers.losses)


BAD_MODELS = {
    "dense": (
        tiny_llama,
        "LlamaForCausalLM has no mixture of experts that MoExtend can extend: no module has a child",
    ),
    "with an adapter": (
        lambda: get_peft_model(MIXTRAL.build(), LoraConfig(target_modules=["q_proj"])),
        "PeftModel carries adapters.*merge_and_unload",
    ),
    "extended": (lambda: get_peft_model(MIXTRAL.build(), config_for(MIXTRAL)).base_model.model, "carries adapters"),
    "wrapped": (lambda: nn.DataParallel(MIXTRAL.build()), "DataParallel is wrapped for distributed training.*bare"),
    "on the meta device": (
        lambda: MIXTRAL.build().to("meta"),
        "parameters of MixtralForCausalLM are on the meta device",
    ),
}


@pytest.mark.parametrize("kind", BAD_MODELS)
def test_a_model_that_cannot_be_measured_is_refused(kind):
    build, message = BAD_MODELS[kind]
    with pytest.raises(ValueError, match=message):
        Extender(build())


def test_a_quantised_model_is_refused():
    model = MIXTRAL.build()
    model.is_quantized = True
    with pytest.raises(ValueError, match="is quantised, and the Trainer refuses to train it"):
        Extender(model)


def test_arguments_that_make_no_sense_are_all_named(tmp_path):
    with pytest.raises(ValueError) as caught:
        measure(MIXTRAL.build(), tmp_path, [], [], steps=0, learning_rate=0, batch_size=0.5, router_aux_loss_coef=-1.0)
    message = str(caught.value)
    assert message.count("\n  - ") == 6
    assert "steps must be a whole number of at least 1, but is 0" in message
    assert "train_set is empty" in message and "probe_set is empty" in message


@pytest.mark.parametrize("is_silent", [False, True], ids=["shown", "disabled"])
def test_both_counts_show_a_progress_bar_that_can_be_disabled(is_silent, tmp_path, capsys):
    measure(MIXTRAL.build(), tmp_path, args=quiet(tmp_path, disable_tqdm=is_silent))
    shown = capsys.readouterr().err
    for moment in ("before", "after"):
        assert (f"expert selection {moment}: 100%" in shown) is not is_silent
    assert ("3/3" in shown) is not is_silent


class Stream(torch.utils.data.IterableDataset):
    """Rows without a length."""

    def __init__(self, rows) -> None:
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def test_streams_are_measured_and_empty_ones_named(tmp_path):
    model = MIXTRAL.build()
    assert measure(model, tmp_path, probe_set=Stream(PROBE)).before == measure(model, tmp_path).before
    with pytest.raises(ValueError, match="train_set is empty.*\n.*probe_set is empty"):
        measure(model, tmp_path, Stream([]), Stream([]))


def test_a_probe_set_of_padding_is_named(tmp_path):
    rows = [{**row, "attention_mask": torch.zeros_like(row["attention_mask"])} for row in PROBE]
    with pytest.raises(ValueError, match=r"no token through the routers of layers \[0, 1, 2\]"):
        measure(MIXTRAL.build(), tmp_path, probe_set=rows)


def test_labels_that_teach_nothing_are_named(tmp_path):
    rows = [{**row, "labels": torch.full_like(row["labels"], -100)} for row in TRAIN]
    with pytest.raises(FloatingPointError, match="The loss is nan in step 1. Make sure that every batch has labels"):
        measure(MIXTRAL.build(), tmp_path, rows)


def test_routers_without_a_gradient_are_named(tmp_path):
    # with one expert per token Mixtral's weight is 1 whatever the router says
    model = MIXTRAL.build(num_experts_per_tok=1)
    before = state_of(model)
    with pytest.raises(RuntimeError, match="No router has changed in 2 steps.*router_aux_loss_coef"):
        measure(model, tmp_path, router_aux_loss_coef=0.0)
    assert_same_state(state_of(model), before)
    assert measure(model, tmp_path, router_aux_loss_coef=0.1).num_probe_tokens == 48


def test_a_broken_model_is_named(tmp_path):
    model = MIXTRAL.build()
    model.lm_head.weight.data[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="The loss is nan in step 1"):
        measure(model, tmp_path)


def test_a_model_that_would_be_sharded_is_refused(tmp_path):
    args = quiet(tmp_path)
    args.deepspeed = {"zero_optimization": {"stage": 3}}
    with pytest.raises(ValueError, match="deepspeed or fsdp shards"):
        measure(MIXTRAL.build(), tmp_path, args=args)


@pytest.mark.slow
def test_two_processes_find_the_same_and_count_every_row_once(tmp_path):
    folders = (Path(__file__).parents[2] / "src", Path(__file__).parents[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, folders))}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    done = subprocess.run([*command, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300)
    files = [tmp_path / f"rank{rank}.json" for rank in range(2)]
    assert all(file.is_file() for file in files), done.stderr[-3000:]
    first, second = (json.loads(file.read_text()) for file in files)
    assert first["report"] == second["report"]
    assert first["is_same"] and second["is_same"]
    report = ExtenderReport.from_dict(first["report"])
    alone = measure(MIXTRAL.build(), tmp_path, probe_set=PROBE[:5])
    assert report.before == alone.before
    assert report.num_probe_tokens == 40


def main(folder: str) -> None:
    """One of the two processes: five probe rows, so that one gets more than the other."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    args = quiet(folder)
    model = MIXTRAL.build()
    before = state_of(model)
    report = measure(model, folder, probe_set=PROBE[:5], args=args)
    assert_same_state(state_of(model), before)
    found = {"report": report.to_dict(), "is_same": True}
    Path(folder, f"rank{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    # gloo sometimes aborts while the interpreter shuts down, after all the work is done
    os._exit(0)


def test_what_is_not_text_is_stacked_and_text_is_padded(tmp_path):
    batch = image_batch()
    rows = [{name: rows[i] for name, rows in batch.items()} for i in range(len(batch["input_ids"]))]
    for name in ("input_ids", "attention_mask", "labels"):
        rows[1][name] = rows[1][name][:-2]
    vocabulary = {f"w{i}": i for i in range(64)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="w1")), pad_token="w0", unk_token="w1"
    )
    extender = Extender(tiny_moe_llava(), tokenizer)
    report = extender.measure(rows, rows, 2, learning_rate=0.05, batch_size=2, args=quiet(tmp_path))
    assert report.num_probe_tokens == sum(len(row["input_ids"]) for row in rows)
    rows[1]["pixel_values"] = rows[1]["pixel_values"][..., :-1]
    with pytest.raises(ValueError, match="'pixel_values' of different shapes"):
        extender.measure(rows, rows, 2, batch_size=2, args=quiet(tmp_path))


if __name__ == "__main__":
    main(*sys.argv[1:])
