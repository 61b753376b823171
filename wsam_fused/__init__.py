"""Fused SAM-family optimizers for PyTorch."""

from wsam_fused.methods import SAM, WSAM
from wsam_fused.version import __version__

__all__ = ["SAM", "WSAM", "__version__"]
