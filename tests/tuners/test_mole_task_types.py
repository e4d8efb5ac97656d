"""Every task type of PEFT wraps, trains and comes back from disk."""

from __future__ import annotations

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model

from peft_moe import MoLEConfig
from tiny_architectures import BERT, PLAIN, T5, sequence_pair, tokens


def bert(model: str, **overrides):
    return lambda: getattr(transformers, model)(transformers.BertConfig(**{**BERT, **overrides}))


def llama(model: str, **overrides):
    return lambda: getattr(transformers, model)(transformers.LlamaConfig(**{**PLAIN, **overrides}))


SPAN = {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 3])}
TASKS = {
    "sequence-classification-encoder": (
        "SEQ_CLS",
        bert("BertForSequenceClassification"),
        {"labels": torch.tensor([0, 1])},
    ),
    "sequence-classification-decoder": (
        "SEQ_CLS",
        llama("LlamaForSequenceClassification", num_labels=3),
        {"labels": torch.tensor([0, 2])},
    ),
    "token-classification": ("TOKEN_CLS", bert("BertForTokenClassification"), {"labels": torch.ones(2, 6).long()}),
    "question-answering": ("QUESTION_ANS", bert("BertForQuestionAnswering"), SPAN),
    "causal-language-model": ("CAUSAL_LM", llama("LlamaForCausalLM"), {"labels": torch.ones(2, 6).long()}),
    "sequence-to-sequence": (
        "SEQ_2_SEQ_LM",
        lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)),
        {"labels": torch.ones(2, 4).long()},
    ),
    "feature-extraction": ("FEATURE_EXTRACTION", bert("BertModel"), {}),
}


@pytest.mark.parametrize("task", TASKS)
def test_task_type_trains_and_comes_back_to_the_bit(task, tmp_path):
    task_type, build, labels = TASKS[task]
    batch = {**(sequence_pair() if task_type == "SEQ_2_SEQ_LM" else tokens()), **labels}
    torch.manual_seed(0)
    base = build()
    weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = get_peft_model(base, MoLEConfig(r=2, init_lora_weights=False, task_type=task_type)).train()
    output = model(**batch)
    (output.loss if labels else output.last_hidden_state.square().mean()).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    model.eval().save_pretrained(tmp_path)
    fresh = build()
    fresh.load_state_dict(weights)
    loaded = PeftModel.from_pretrained(fresh, tmp_path).eval()
    assert type(loaded) is type(model)
    with torch.no_grad():
        found, expected = loaded(**batch), model(**batch)
    assert found.keys() == expected.keys()
    for name in ("loss", "logits", "start_logits", "last_hidden_state"):
        if name in expected:
            assert torch.equal(found[name], expected[name]), name


def test_encoder_decoder_generates():
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**T5))
    model = get_peft_model(model, MoLEConfig(r=2, init_lora_weights=False, task_type="SEQ_2_SEQ_LM")).eval()
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "num_beams": 2}
    cached, uncached = (model.generate(**tokens(), use_cache=use, **settings) for use in (True, False))
    assert torch.equal(cached, uncached)
