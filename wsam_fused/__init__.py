"""Fused SAM-family optimizers for PyTorch."""

from wsam_fused.methods import BSAM, ESAM, GNP, GSAM, RWSAM, SAM, WSAM
from wsam_fused.version import __version__

__all__ = ["BSAM", "ESAM", "GNP", "GSAM", "RWSAM", "SAM", "WSAM", "__version__"]
