"""Package metadata: what clusterface consists of and what it needs. Exact versions stand in constraints.txt."""

from __future__ import annotations

from setuptools import find_packages, setup

_PACKAGES = ["configs", "data", "backbones", "partial_fc", "clustering", "training", "evaluation"]

setup(
    name="clusterface",
    version="0.1.0",
    description="Distributed face recognition training: Partial FC beside supervised contrastive clustering",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=[pattern for name in _PACKAGES for pattern in (name, f"{name}.*")]),
    package_data={"configs": ["*.yaml"]},
    py_modules=["sharding", "train_dist"],
    install_requires=[
        "torch>=2.11",
        "numpy>=2.0",
        "scipy>=1.13",
        "simplejpeg>=1.8",
        "opencv-python-headless>=4.10",
        "pillow>=11",
        "PyYAML>=6",
        "rich>=13",
        "matplotlib>=3.9",
        "tensorboard>=2.18",
        "fsspec>=2025.9",
    ],
    extras_require={
        "dali": ["nvidia-dali-cuda130>=2.0; platform_system == 'Linux'"],
        "parquet": ["pyarrow>=17"],
        "s3": ["s3fs>=2025.9"],
        "export": ["onnx>=1.18", "onnxscript>=0.5", "onnxruntime>=1.22"],
        "prometheus": ["prometheus-client>=0.26"],
        "wandb": ["wandb>=0.31"],
        "mlflow": ["mlflow-skinny>=3.17"],
        "timm": ["timm>=1.0"],
        "faiss-gpu": ["faiss-gpu>=1.15; platform_system == 'Linux'"],
        "dev": [
            "faiss-cpu",
            "flask",
            "flask-cors",
            "fonttools",
            "hypothesis",
            "moto[s3]",
            "mypy",
            "onnx",
            "onnxruntime",
            "onnxscript",
            "playwright",
            "pre-commit",
            "prometheus-client",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "pyarrow",
            "ruff",
            "s3fs",
            "safetensors",
            "scikit-learn",
            "triton; platform_system == 'Linux'",
            "types-PyYAML",
        ],
    },
)
