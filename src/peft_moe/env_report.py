"""`python -m peft_moe.env_report`: installed versions, the devices, and each kernel backend usable or why not."""

import platform

import torch

from ._version import __version__
from .kernels import backend_report
from .versions import installed_version


DISTRIBUTIONS = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "evaluate",
    "trl",
    "triton",
    "bitsandbytes",
    "torchao",
    "sentence-transformers",
    "flash-attn",
)


def env_report() -> str:
    """The report as text, made to be pasted into an issue."""
    sections = {
        "Versions": _versions(),
        "Devices": _devices(),
        "Kernel backends": [
            (name, f"usable{f' ({reason})' if reason else ''}" if usable else f"not usable: {reason}")
            for name, usable, reason in backend_report()
        ],
    }
    return "\n\n".join(_section(title, rows) for title, rows in sections.items())


def _versions() -> list[tuple[str, str]]:
    ours = [("peft_moe", __version__), ("Python", platform.python_version()), ("platform", platform.platform())]
    return ours + [(name, installed_version(name) or "not installed") for name in DISTRIBUTIONS]


def _devices() -> list[tuple[str, str]]:
    rows = [("CPU threads", str(torch.get_num_threads())), ("CUDA (torch built for)", torch.version.cuda or "none")]
    if not torch.cuda.is_available():
        return [*rows, ("GPU", "none visible")]
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory_gib = device.total_memory / 2**30
        rows.append((f"GPU {index}", f"{device.name}, {memory_gib:.0f} GiB, capability {device.major}.{device.minor}"))
    return rows


def _section(title: str, rows: list[tuple[str, str]]) -> str:
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in rows)])


if __name__ == "__main__":
    print(env_report())
