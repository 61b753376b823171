"""The methods, one file each."""

from wsam_fused.methods.sam import SAM
from wsam_fused.methods.wsam import WSAM

METHODS = (SAM, WSAM)

__all__ = ["METHODS", "SAM", "WSAM"]
