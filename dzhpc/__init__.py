"""dzhpc: neural networks trained by function queries alone, as an MPI batch job.

Importing the package starts neither MPI nor CUDA.
"""

from dzhpc.engines import make_engine
from dzhpc.estimators import autograd, cge, rge
from dzhpc.models import load_model

__all__ = ["autograd", "cge", "load_model", "make_engine", "rge"]
__version__ = "0.1.0"
