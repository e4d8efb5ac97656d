"""Loads what the program of the README has pushed, as its reader would."""

from __future__ import annotations

from outcomes import compare, finish
from peft import AutoPeftModelForCausalLM

import peft_moe  # noqa: F401


finish({"loaded": compare("readme", lambda: AutoPeftModelForCausalLM.from_pretrained("my-name/my-adapter"))})
