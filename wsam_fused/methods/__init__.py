"""The methods, one file each."""

from wsam_fused.methods.bsam import BSAM
from wsam_fused.methods.esam import ESAM
from wsam_fused.methods.gnp import GNP
from wsam_fused.methods.gsam import GSAM
from wsam_fused.methods.rwsam import RWSAM
from wsam_fused.methods.sam import SAM
from wsam_fused.methods.wsam import WSAM

METHODS = (SAM, WSAM, GSAM, BSAM, ESAM, RWSAM, GNP)

__all__ = ["BSAM", "ESAM", "GNP", "GSAM", "METHODS", "RWSAM", "SAM", "WSAM"]
