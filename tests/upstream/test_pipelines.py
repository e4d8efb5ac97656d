"""A MoeLlava in transformers' pipelines: in batches it says the same as alone, and features are those of a forward."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from transformers import pipeline
from transformers.utils import is_torchvision_available

from models.tiny_llava import tiny_processor
from upstream.tester import MoeLlavaTester


pytestmark = pytest.mark.slow
NEEDS_TORCHVISION = pytest.mark.skipif(not is_torchvision_available(), reason="any-to-any needs torchvision")


def processor_of(tester: MoeLlavaTester):
    processor = tiny_processor()
    processor.image_processor.size = {"shortest_edge": tester.image_size}
    processor.image_processor.crop_size = {"height": tester.image_size, "width": tester.image_size}
    processor.patch_size = tester.patch_size
    processor.tokenizer.padding_side = "left"
    return processor


@pytest.mark.parametrize("task", ["image-text-to-text", pytest.param("any-to-any", marks=NEEDS_TORCHVISION)])
def test_examples_together_give_what_each_gives_alone(task, tmp_path):
    tester = MoeLlavaTester(None)
    tester.conditional_generation_class(tester.get_config()).save_pretrained(tmp_path)
    processor_of(tester).save_pretrained(tmp_path)
    options = {"max_new_tokens": 4, "do_sample": False}
    pipe = pipeline(task, model=str(tmp_path), processor=processor_of(tester), generate_kwargs=options, device="cpu")
    assert type(pipe.model) is tester.conditional_generation_class
    image = Image.effect_noise((8, 8), 50).convert("RGB")
    examples = [(image.rotate(90 * number), f"<image> a b c{' d e' * (number % 2)}") for number in range(5)]
    answers = []
    for picture, text in examples:
        (answer,) = pipe(picture, text=text)
        assert answer["input_text"] == text and answer["generated_text"].startswith(text)
        answers.append(answer)
    pictures, texts = map(list, zip(*examples, strict=True))
    for batch_size in (1, 4):
        together = pipe(pictures, text=texts, batch_size=batch_size)
        assert [answer[0] if isinstance(answer, list) else answer for answer in together] == answers


def test_features_are_those_of_a_forward():
    tester = MoeLlavaTester(None)
    model = tester.base_model_class(tester.get_config()).eval()
    tokenizer = tiny_processor().tokenizer
    pipe = pipeline("feature-extraction", model=model, tokenizer=tokenizer, device="cpu")
    found = torch.tensor(pipe("a b c"))
    with torch.no_grad():
        expected = model(**tokenizer("a b c", return_tensors="pt")).last_hidden_state
    assert tuple(found.shape) == (1, 3, 32)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
