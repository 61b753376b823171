"""What one wants to know of the minimum that was found; see docs/landscape.md.

``loss`` is everywhere a function without arguments that returns the scalar mean loss of the model
at its present weights, with a graph and without calling ``backward``; or a sequence of such
functions, one for each batch of equal size, whose mean is the loss. They are evaluated one after
the other, with the memory of one batch.

The model is evaluated in the mode it is in: call ``model.eval()`` first. In training mode every
evaluation begins with the same buffers and the same state of torch's default generators (of the CPU
and of the parameters' CUDA devices), so that figures with dropout are those of a few masks, and
noisy. Parameters that do not require a gradient stay out. Weights, ``.grad``, buffers, mode and
these generators are left bit by bit as they were found, also after an exception.
"""

from wsam_fused.landscape.directions import direction_to, random_direction
from wsam_fused.landscape.hessian import (
    HessianEigenpairs,
    hessian_eigenpairs,
    hessian_max_eigenvalue,
)
from wsam_fused.landscape.loss_slice import LossSlice
from wsam_fused.landscape.noise import gradient_noise_trace
from wsam_fused.landscape.slices import loss_slice_1d, loss_slice_2d
from wsam_fused.landscape.worst_case import sharpness

__all__ = [
    "HessianEigenpairs",
    "LossSlice",
    "direction_to",
    "gradient_noise_trace",
    "hessian_eigenpairs",
    "hessian_max_eigenvalue",
    "loss_slice_1d",
    "loss_slice_2d",
    "random_direction",
    "sharpness",
]
