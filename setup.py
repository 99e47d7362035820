"""Package metadata; tools are configured in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "harmonic_triton" / "_version.py").read_text()).group(1)

EXTRAS = {
    "bench": [
        "cut-cross-entropy; sys_platform == 'linux'",
        "liger-kernel; sys_platform == 'linux'",
        "matplotlib",
        "pykeops; sys_platform == 'linux'",
        "pytest-benchmark",
        "scipy",
    ],
    "examples": ["matplotlib", "tokenizers", "tqdm"],
    "analysis": ["matplotlib", "safetensors", "scikit-learn", "scipy", "tqdm", "umap-learn"],
    "zarr": ["zarr"],
    "transformers": ["accelerate", "transformers>=5.5"],
    "docs": ["mkdocs-material", "mkdocstrings[python]", "ruff"],
    "test": ["hypothesis", "mpmath", "mypy", "peft", "pytest", "pytest-benchmark", "pytest-xdist", "ruff"],
}

setup(
    name="harmonic-triton",
    version=VERSION,
    description="Fused harmonic loss for large vocabularies, and the loss kernel of trained models",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="MIT",
    license_files=["LICENSE"],
    project_urls={
        "Harmonic loss (paper)": "https://arxiv.org/abs/2502.01628",
        "The loss kernel (paper)": "https://arxiv.org/abs/2509.26537",
    },
    python_requires=">=3.10",
    packages=find_packages(include=["harmonic_triton", "harmonic_triton.*"]),
    package_data={"harmonic_triton": ["py.typed"]},
    install_requires=["torch>=2.10", "numpy", "typing-extensions>=4.1", "triton>=3.6; sys_platform == 'linux'"],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["harmonic-triton = harmonic_triton.__main__:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in (10, 11, 12, 13)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    zip_safe=False,
)
