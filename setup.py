"""Metadata of the package. Tool settings live in `pyproject.toml`."""

import re
from pathlib import Path

from setuptools import find_packages, setup


ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "src/peft_moe/_version.py").read_text()).group(1)
README = ROOT / "README.md"

REQUIRED = [
    "accelerate>=1.4.0",
    "datasets>=4.7.0",
    "evaluate>=0.4.6",
    "huggingface_hub>=1.5.0",
    "peft>=0.21.0",
    "safetensors>=0.7.0",
    "scikit-learn>=1.5.0",
    "torch>=2.7.0",
    "transformers>=5.10.1",
]

EXTRAS = {
    "cluster": ["sentence-transformers>=5.2.0"],
    "plots": ["matplotlib>=3.8"],
    "flash-attn": ["flash-attn>=2.7"],
    "triton": ["triton>=3.3; platform_system == 'Linux'"],
    "quantization": ["bitsandbytes>=0.49", "torchao>=0.16"],
    "trl": ["trl>=1.0.0"],
}
EXTRAS["all"] = sorted({requirement for name in EXTRAS if name != "flash-attn" for requirement in EXTRAS[name]})
EXTRAS["test"] = [
    *EXTRAS["cluster"],
    *EXTRAS["plots"],
    *EXTRAS["quantization"],
    *EXTRAS["triton"],
    *EXTRAS["trl"],
    "gguf>=0.17",
    "hypothesis>=6.100",
    "pytest>=8.4",
    "pytest-cov>=7.0",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "xllamacpp>=2026.10; platform_system == 'Linux' and platform_machine == 'x86_64'",
]
EXTRAS["quality"] = ["mypy>=1.15", "pre-commit>=4.0", "ruff>=0.14"]
EXTRAS["docs"] = ["mkdocs-material>=9.6", "mkdocstrings[python]>=0.29", "ruff>=0.14"]

setup(
    name="peft_moe",
    version=VERSION,
    description="Mixture-of-experts tuners for Hugging Face PEFT",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    author="The peft_moe authors",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["mixture of experts", "moe", "lora", "peft", "fine-tuning", "transformers"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={"peft_moe": ["py.typed", "metrics/*/*.py", "metrics/*/README.md"]},
    python_requires=">=3.10",
    install_requires=REQUIRED,
    extras_require=EXTRAS,
    zip_safe=False,
)
