"""Packaging of transfusion_fast: `pip install .` or, to work on it, `make setup`."""

from setuptools import setup

setup(
    name="transfusion_fast",
    version="0.1.0",
    description="Train Transfusion models: Triton kernels, packed WebDataset shards, DeepSpeed ZeRO-3",
    author="The transfusion_fast authors",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    # Listed, never found: a bare find_packages() would pick up tests and train, and a top-level `kernels` of ours would
    # overwrite the other project's package of that name. transfusion_fast/kernels is a symlink to ../kernels; a wheel
    # gets the files themselves.
    packages=[
        "transfusion_fast",
        "transfusion_fast.data",
        "transfusion_fast.kernels",
        "transfusion_fast.model",
        "transfusion_fast.prepare",
        "transfusion_fast.prepare.examples",
        "transfusion_fast.prepare.sources",
        "transfusion_fast.sampling",
        "transfusion_fast.training",
    ],
    # Only Python files are installed. The YAML files in train/configs belong to the repository's command lines.
    include_package_data=False,
    install_requires=[
        "torch>=2.13",
        "deepspeed>=0.19.8",
        "einops>=0.8",
        "filelock>=4.2",
        "fsspec>=2024.2",
        "numpy>=1.26",
        "pillow>=11.3",
        "psutil>=5.9",
        "pydantic>=2.8",
        "pyyaml>=6.0",
        "safetensors>=0.4.3",
        "tqdm>=4.66",
    ],
    extras_require={
        # Pictures of samples and runs, and the digits with the classifier that judges them.
        "examples": ["matplotlib>=3.8", "scikit-learn>=1.4"],
        # A tokenizer.json, and Parquet.
        "data": ["tokenizers>=0.20", "pyarrow>=17.0"],
        # Images as an autoencoder's latents.
        "vae": ["diffusers>=0.30"],
        # Images as a vision encoder's features.
        "encoder": ["transformers>=4.45"],
        # The page of train/demo.py, and its test in a browser. Not part of "test": gradio needs an older pillow than
        # constraints.txt pins.
        "demo": ["gradio>=6.0"],
        "demo-test": ["playwright>=1.50"],
        # BLEU of captions.
        "evaluation": ["sacrebleu>=2.4"],
        # The kernels. Nothing in it compiles while it is installed.
        "gpu": ["triton>=3.6"],
        # A baseline of the benchmarks, which compiles for long where there is no wheel for the machine.
        "flash-attn": ["flash-attn>=2.7"],
        "bench": ["matplotlib>=3.8", "pandas>=2.2", "triton>=3.6"],
        # Loggers of training, beside the file of metrics.
        "tensorboard": ["tensorboard>=2.17"],
        "wandb": ["wandb>=0.31"],
        # Everything that the tests use. Triton is there for its interpreter and its compiler, which need no GPU.
        "test": [
            "pytest>=8.0",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "ruff>=0.9",
            "mypy>=1.13",
            "types-PyYAML>=6.0",
            "aiohttp>=3.9",
            "diffusers>=0.30",
            "matplotlib>=3.8",
            "pandas>=2.2",
            "pyarrow>=17.0",
            "sacrebleu>=2.4",
            "scikit-learn>=1.4",
            "tensorboard>=2.17",
            "tokenizers>=0.20",
            "transformers>=4.45",
            "triton>=3.6",
            "webdataset>=1.0",
        ],
    },
)
