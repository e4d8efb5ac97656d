"""Tuners on quantised base models: the base layer is only called, so every kind takes the same path.

bitsandbytes and torchao quantise linears, and leave stacked experts and their routers as they are.
"""

from __future__ import annotations

import importlib.util
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from tuner_cases import ONE_PER_TUNER, one_case_per_tuner

from peft_moe import MoLEConfig


def bitsandbytes_config(**settings):
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed: pip install 'peft_moe[quantization]'")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**settings)


def nf4():
    return bitsandbytes_config(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


def int8():
    return bitsandbytes_config(load_in_8bit=True)


def torchao_int8():
    if importlib.util.find_spec("torchao") is None:
        pytest.skip("torchao is not installed: pip install 'peft_moe[quantization]'")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig(version=2))


KINDS = {"nf4": (nf4, "Linear4bit"), "int8": (int8, "Linear8bitLt"), "torchao-int8": (torchao_int8, "Linear")}
every_kind = pytest.mark.parametrize("kind", KINDS)
IN_SHORT = [("mole", "nf4"), ("moextend", "torchao-int8")]
"""of the rows with `Trainer`, those that are not exhaustive"""


def quantised(case, kind, folder):
    """The base model of a case with quantised linears; its weights are the same in every call."""
    make, class_name = KINDS[kind]
    config = make()
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    if not case.adapts_linears:
        sizes |= {"head_dim": 16, "num_key_value_heads": 4}  # what the CPU kernel of nf4 can divide
    if not (folder / "config.json").exists():
        case.model(**sizes).save_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map={"": "cpu"})
    assert type(model.model.layers[0].self_attn.q_proj).__name__ == class_name
    return model


@every_kind
@one_case_per_tuner
def test_quantised_model_trains_and_comes_back_to_the_bit(case, kind, tmp_path):
    model = quantised(case, kind, tmp_path / "base")
    base = case.logits(model.eval())
    model = get_peft_model(prepare_model_for_kbit_training(model, use_gradient_checkpointing=False), case.config())
    with model.eval().disable_adapter():
        assert torch.equal(case.logits(model), base)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    model.train()
    losses = []
    for _ in range(4):
        loss = model(**case.batch()).loss
        loss.backward()
        assert all(p.grad is not None for p in parameters)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    expected = case.logits(model.eval())
    model.save_pretrained(tmp_path / "adapter")
    fresh = prepare_model_for_kbit_training(quantised(case, kind, tmp_path / "base"), use_gradient_checkpointing=False)
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    assert torch.equal(case.logits(loaded), expected)


@every_kind
def test_merging_into_quantised_weights_is_refused(kind, tmp_path):
    case = next(case for case in ONE_PER_TUNER if case.tuner == "mole")
    config = MoLEConfig(r=2, num_experts=1, top_k=1, init_lora_weights=False)
    model = get_peft_model(quantised(case, kind, tmp_path / "base"), config)
    expected = case.logits(model.eval())
    with pytest.raises(ValueError, match=r"is quantised \(\w+\), and merging would round the adapter away"):
        model.merge_and_unload()
    assert torch.equal(case.logits(model), expected)


@every_kind
@one_case_per_tuner
def test_quantised_model_trains_with_checkpointing(case, kind, tmp_path):
    found = []
    for is_checkpointed in (False, True):
        model = prepare_model_for_kbit_training(
            quantised(case, kind, tmp_path / "base"),
            use_gradient_checkpointing=is_checkpointed,
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )
        torch.manual_seed(7)
        model = get_peft_model(model, case.config()).train()
        model(**case.batch()).loss.backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, checkpointed in zip(*found, strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=1e-4, atol=1e-7)


@every_kind
@one_case_per_tuner
def test_quantised_base_layers_are_kept_as_they_are(case, kind, tmp_path):
    model = quantised(case, kind, tmp_path / "base")
    layers = dict(model.named_modules())
    model = get_peft_model(model, case.config())
    adapted = {
        name.removeprefix("base_model.model."): module.get_base_layer()
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
    }
    assert adapted
    assert all(layers[name] is module for name, module in adapted.items())
    assert all(module is layers[name] for name, module in model.unload().named_modules() if name in layers)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "kind"),
    [
        pytest.param(
            case,
            kind,
            id=f"{case.tuner}-{kind}",
            marks=() if (case.tuner, kind) in IN_SHORT else pytest.mark.exhaustive,
        )
        for case in ONE_PER_TUNER
        for kind in KINDS
    ],
)
def test_trainer_saves_and_resumes_to_the_bit(case, kind, tmp_path):
    first = trainer_on_quantised(case, kind, tmp_path)
    before = trained_parameters(first)
    first.train()
    expected = trained_parameters(first)
    assert all(not torch.equal(expected[name], before[name]) for name in before)
    resumed = trainer_on_quantised(case, kind, tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    assert resumed.state.global_step == 2
    for name, parameter in trained_parameters(resumed).items():
        assert torch.equal(parameter, expected[name]), name


def trainer_on_quantised(case, kind, folder):
    """Two steps with gradient checkpointing, each of which is saved."""
    base = prepare_model_for_kbit_training(quantised(case, kind, folder / "base"))
    torch.manual_seed(7)
    model = get_peft_model(base, case.config())
    rows = [{name: value[i] for name, value in case.batch(4).items()} for i in range(4)]
    arguments = TrainingArguments(
        str(folder / "out"),
        max_steps=2,
        save_steps=1,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        gradient_checkpointing=True,
        report_to=[],
        use_cpu=True,
    )
    return Trainer(model, arguments, train_dataset=rows)


def trained_parameters(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
