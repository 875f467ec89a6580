"""dzhpc: neural networks trained by function queries alone, as an MPI batch job.

Importing the package starts neither MPI nor CUDA.
"""

import importlib

_HOMES = {
    "make_engine": "engines", "autograd": "method.estimators", "cge": "method.estimators", "rge": "method.estimators",
    "load_model": "models.zoo", "Loop": "training.loop",
}  # fmt: skip
__all__ = ["Loop", "autograd", "cge", "load_model", "make_engine", "rge"]
__version__ = "0.1.0"


def __getattr__(name: str):
    """The public functions, when they are first asked for: they bring torch, and a rank has to be on its guard before that."""
    if name not in _HOMES:
        raise AttributeError(f"module 'dzhpc' has no attribute '{name}'")
    return getattr(importlib.import_module(f"dzhpc.{_HOMES[name]}"), name)
