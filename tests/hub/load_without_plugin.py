"""Run by the tests: loads from the Hub in a process that never imports `peft_moe`."""

from __future__ import annotations

import sys

import torch
from outcomes import compare, error_of, finish
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor


def base(name: str = "llama"):
    return AutoModelForCausalLM.from_pretrained(f"someone/{name}")


def main() -> None:
    torch.set_num_threads(1)
    auto = AutoModelForImageTextToText.from_pretrained
    results = {}
    for tuner in ("mole", "mocle", "moextend"):
        on, repository = ("mixtral" if tuner == "moextend" else "llama"), f"someone/{tuner}"
        results[f"{tuner} peft"] = error_of(lambda: PeftModel.from_pretrained(base(on), repository))
        results[f"{tuner} auto-peft"] = error_of(lambda: AutoPeftModelForCausalLM.from_pretrained(repository))
        results[f"{tuner} load-adapter"] = error_of(lambda: base(on).load_adapter(repository))
    results["exported"] = compare(
        "exported", lambda: PeftModel.from_pretrained(base(), "someone/exported", subfolder="cluster_0")
    )
    results["extended"] = compare("extended", lambda: base("extended"))
    results["moe-llava untrusted"] = error_of(lambda: auto("someone/moe-llava"))
    results["moe-llava"] = compare("moe-llava", lambda: auto("someone/moe-llava", trust_remote_code=True))
    results["processor"] = type(AutoProcessor.from_pretrained("someone/moe-llava", trust_remote_code=True)).__name__
    results["imported"] = [name for name in sys.modules if name.partition(".")[0] == "peft_moe"]
    finish(results)


main()
