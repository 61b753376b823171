"""Sharpness: how far the loss rises towards the worst-case neighbour."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from wsam_fused.arguments import number
from wsam_fused.distributed import is_dtensor
from wsam_fused.landscape.as_found import as_found
from wsam_fused.landscape.evaluation import (
    Loss,
    evaluate,
    gradients,
    loss_functions,
    mean_loss,
    number_of,
    require_finite,
    require_graph,
    trainable,
)
from wsam_fused.methods.sam import SAM


def sharpness(
    model: nn.Module,
    loss: Loss | Sequence[Loss],
    rho: float,
    *,
    geometry: str = "euclidean",
    eta: float | None = None,
    only_weights: bool = False,
    backend: str = "auto",
) -> float:
    """Return L(w + e) - L(w) at the first-order worst case e within the radius rho.

    Math:
        e = rho M g / (sqrt(sum of M g^2) + 1e-12),  g = grad L(w)    M: the geometry's metric

    The perturbation is that of :class:`wsam_fused.SAM`, of all parameters that require a gradient.
    Under DistributedDataParallel each rank looks at its own loss and gradient. Parameters may be
    DTensors: the gradient is then what ``backward`` leaves on the ranks, which all have to call
    this, and the loss that of the rank.

    Args:
        model: In the mode in which it shall be evaluated; see :mod:`wsam_fused.landscape`.
        loss: The mean loss, or one for each batch of equal size.
        rho: Radius, >= 0: the norm of e in the geometry, in units of the parameters for the
            Euclidean one, relative to them for the adaptive one.
        geometry: ``"euclidean"``, ``"adaptive"`` or ``"fisher"``, as for the optimizers.
        eta: Of the metric, >= 0. By default 0.01 for ``"adaptive"``, 1 for ``"fisher"``.
        only_weights: Use the metric only for parameters whose name contains "weight".
        backend: Of the perturbation, ``"auto"`` or the name of one.

    Returns:
        The rise of the loss, in its units, as precise as the dtype of the loss makes the difference
        of two losses.

    Raises:
        TypeError: ``model`` is no module, or ``loss`` no function that returns a scalar tensor.
        ValueError: An argument is out of its range, a loss or the gradient is not finite, or the
            loss does not depend on the parameters.

    Reference:
        Foret, Kleiner, Mobahi, Neyshabur: Sharpness-Aware Minimization for Efficiently Improving
        Generalization. ICLR 2021. arXiv:2010.01412.
        Yue, Jiang, Ye, Gao, Liu, Zhang: Sharpness-Aware Minimization Revisited: Weighted Sharpness
        as a Regularization Term. KDD 2023. arXiv:2305.15817, equation 1.
    """
    rho = number("rho", rho, 0.0)
    functions = loss_functions("loss", loss)
    named = trainable(model, takes_sharded=True)
    params = list(named.values())
    # Exact restoring; there is no step, so that nothing of the base optimizer matters.
    optimizer = SAM(
        list(named.items()),
        torch.optim.SGD,
        rho=rho,
        geometry=geometry,
        eta=eta,
        only_weights=only_weights,
        restore="backup",
        backend=backend,
    )
    with as_found(model) as start:
        with start.evaluation(), torch.enable_grad():
            before = _set_mean_gradient(functions, params)
        try:
            # The gradients are copied: autograd may have given one memory to two parameters.
            optimizer.first_step()
            for param in params:
                param.grad = None
            _require_finite_norm(optimizer, before)
            after = mean_loss(functions, start)
        finally:
            optimizer.restore()
    # Only now: of sharded parameters, other ranks take part in all that comes before.
    require_finite(before, "at the weights as they are")
    require_finite(after, f"at the worst-case neighbour (rho={rho:g})")
    return after - before


def _set_mean_gradient(functions: Sequence[Loss], params: Sequence[nn.Parameter]) -> float:
    """Leave the gradient of the mean loss in ``.grad``, None before, and return the loss."""
    total = 0.0
    # What FSDP2 computes with are not the parameters; only its hooks in backward() know these.
    by_backward = any(is_dtensor(param) for param in params)
    for function in functions:
        value = evaluate(function)
        total += number_of(value)
        value = value / len(functions)
        if by_backward:
            require_graph(value)
            value.backward()  # type: ignore[no-untyped-call]
            continue
        for param, grad in zip(params, gradients(value, params), strict=True):
            if grad is None:
                continue
            # Not in place: the memory of the first one may be that of another parameter's.
            param.grad = grad if param.grad is None else param.grad + grad
    return total / len(functions)


def _require_finite_norm(optimizer: SAM, loss: float) -> None:
    """Raise ValueError on all ranks if the norm over all of them is not finite."""
    engine = optimizer._engine
    assert engine is not None  # first_step() has made it
    if not bool(engine.all_known_are_finite()):
        raise ValueError(f"the gradient of the loss is not finite, where the loss is {loss}")
