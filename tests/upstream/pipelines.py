"""Stand-ins for transformers' tests of single pipelines, and the tiny checkpoints that they load.

transformers' `PipelineTesterMixin` loads each checkpoint and its processor, builds a pipeline by one of the classes
here, runs its test, and then ten examples in batches of four.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any
from unittest import TestCase

import torch
from PIL import Image
from transformers import PreTrainedModel, pipeline
from transformers.utils import is_torchvision_available

from models.tiny_llava import tiny_processor
from upstream import stand_ins
from upstream.tester import TESTERS


PROMPT = "<image> a b c"


class _PipelineTests(TestCase):
    task: str
    num_new = 4

    def get_test_pipeline(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        image_processor: Any = None,
        feature_extractor: Any = None,
        processor: Any = None,
        dtype: str = "float32",
    ) -> tuple[Any, list[Any]]:
        """The pipeline and examples for it."""
        processor.tokenizer.padding_side = "left"
        options = {"processor": processor, "generate_kwargs": {"max_new_tokens": self.num_new, "do_sample": False}}
        pipe = pipeline(self.task, model=model, dtype=dtype, device="cpu", **options)
        image = Image.effect_noise((8, 8), 50).convert("RGB")
        return pipe, [{"images": image, "text": PROMPT}, {"images": image.rotate(90), "text": f"{PROMPT} d e"}]

    def run_pipeline_test(self, pipe: Any, examples: list[Any]) -> None:
        """One example gives text after its prompt, and two together give what each gives alone."""
        answers = []
        for example in examples:
            (answer,) = pipe(example["images"], text=example["text"])
            assert answer["input_text"] == example["text"]
            assert answer["generated_text"].startswith(example["text"])
            answers.append(answer)
        together = pipe([example["images"] for example in examples], text=[example["text"] for example in examples])
        flat = [answer[0] if isinstance(answer, list) else answer for answer in together]
        assert flat == answers


class ImageTextToTextPipelineTests(_PipelineTests):
    """`image-text-to-text`."""

    task = "image-text-to-text"


class AnyToAnyPipelineTests(_PipelineTests):
    """`any-to-any`, with text as output."""

    task = "any-to-any"

    def get_test_pipeline(self, *args: Any, **kwargs: Any) -> tuple[Any, list[Any]]:
        """The pipeline and examples for it; none, for a skipped test, where torchvision is not installed."""
        return super().get_test_pipeline(*args, **kwargs) if is_torchvision_available() else (None, [])


class FeatureExtractionPipelineTests(_PipelineTests):
    """`feature-extraction`, from text alone."""

    task = "feature-extraction"

    def get_test_pipeline(self, model: PreTrainedModel, tokenizer: Any, **kwargs: Any) -> tuple[Any, list[Any]]:
        """The pipeline and examples for it."""
        dtype = kwargs.get("dtype", "float32")
        return pipeline(self.task, model=model, tokenizer=tokenizer, dtype=dtype, device="cpu"), ["a b c", "d e f g"]

    def run_pipeline_test(self, pipe: Any, examples: list[Any]) -> None:
        """The features are those of a forward."""
        found = torch.tensor(pipe(examples[0]))
        with torch.no_grad():
            expected = pipe.model(**pipe.tokenizer(examples[0], return_tensors="pt")).last_hidden_state
        assert tuple(found.shape) == (1, 3, 32)
        torch.testing.assert_close(found, expected.float(), rtol=1e-3, atol=1e-3)


TASKS = {
    "image-text-to-text": ImageTextToTextPipelineTests,
    "any-to-any": AnyToAnyPipelineTests,
    "feature-extraction": FeatureExtractionPipelineTests,
}


def model_mapping(model: str) -> dict[str, type]:
    """Task → class, for one of the models."""
    tester = TESTERS[model]
    generating = tester.conditional_generation_class
    return {
        "image-text-to-text": generating,
        "any-to-any": generating,
        "feature-extraction": tester.base_model_class,
    }


@functools.cache
def tiny_checkpoints() -> tuple[Path, dict[str, Any]]:
    """Folder of one checkpoint per class, and what is in it, both as `PipelineTesterMixin` wants them."""
    folder = stand_ins.empty_tiny_model_folder()
    summary = {}
    for tester in TESTERS.values():
        torch.manual_seed(0)
        config = tester(None).get_config()
        for cls in (tester.base_model_class, tester.conditional_generation_class):
            path = folder / config.model_type / cls.__name__
            cls(config).save_pretrained(path)
            processor = tiny_processor()
            processor.image_processor.size = {"shortest_edge": tester.image_size}
            processor.image_processor.crop_size = {"height": tester.image_size, "width": tester.image_size}
            processor.patch_size = tester.patch_size
            processor.save_pretrained(path)
            summary[cls.__name__] = {
                "tokenizer_classes": [type(processor.tokenizer).__name__],
                "processor_classes": [type(processor.image_processor).__name__],
                "model_classes": [cls.__name__],
            }
    (folder / "reports" / "tiny_model_summary.json").write_text(json.dumps(summary))
    return folder, summary
