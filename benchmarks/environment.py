"""What a result file says about the place where it was taken: hardware, versions, what else ran there."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch


PACKAGES = ("torch", "triton", "transformers", "peft", "peft_moe")
# what may change between two cells of one run
GPU_STATE = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw", "utilization.gpu", "memory.used")


def command() -> str:
    """The line that made a result, without folders outside of the checkout."""
    return " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])


def cpu_name() -> str:
    """Model of the processor, without the name of the machine."""
    found = [line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    return found[0] if found else platform.processor() or "unknown"


def hardware(device: str = "cpu") -> dict[str, object]:
    """Processor, and for `cuda` the model of the GPU, its memory and its driver."""
    found: dict[str, object] = {"device": device, "processor": cpu_name(), "cores": str(os.cpu_count())}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "driver": nvidia_smi("driver_version").get("driver_version", "unknown"),
            "cuda": torch.version.cuda,
        }
    return found


def versions() -> dict[str, str]:
    """Of Python and of everything that has a part in the times; what is not installed is left out."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in PACKAGES:
        try:
            found.setdefault(name, metadata.version(name))
        except metadata.PackageNotFoundError:
            if name == "peft_moe":  # on the path without being installed
                found[name] = sys.modules["peft_moe"].__version__ if "peft_moe" in sys.modules else "unknown"
    return found


def state(device: str = "cpu") -> dict[str, object]:
    """How busy the machine is now: load of the CPU; clocks, load and processes of the GPU."""
    found: dict[str, object] = {"load_average": [round(load, 2) for load in os.getloadavg()]}
    if device == "cuda":
        found |= nvidia_smi(*GPU_STATE)
        found["processes_on_gpu"] = _ask("--query-compute-apps=pid", "--format=csv,noheader").count("\n")
    return found


def nvidia_smi(*fields: str) -> dict[str, str]:
    """Fields of `nvidia-smi --query-gpu` for the first GPU; empty where it does not answer."""
    values = _ask(f"--query-gpu={','.join(fields)}", "--format=csv,noheader").split("\n")[0].split(", ")
    return dict(zip(fields, values)) if len(values) == len(fields) and values != [""] else {}


def _ask(*arguments: str) -> str:
    """Output of `nvidia-smi`, which only reads here."""
    try:
        answer = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return answer.stdout


def _cpuinfo() -> list[str]:
    file = Path("/proc/cpuinfo")
    return file.read_text().splitlines() if file.exists() else []
