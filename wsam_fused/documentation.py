"""The documentation of the arguments that all methods share, written once."""

from __future__ import annotations

import inspect
from typing import TypeVar

COMMON_ARGUMENTS = """\
params: Parameters, named parameters or parameter groups, as ``torch.optim`` takes them. A group
            may have its own values of the method's hyper-parameters and of the base optimizer's.
        base_optimizer: ``torch.optim.SGD``, ``Adam`` or ``AdamW`` (fused update), any other
            ``torch.optim.Optimizer`` class whose ``step()`` needs no closure (stepped as it is), a
            ``functools.partial`` of a class, or an instance over the same parameters, whose groups
            and state then become this optimizer's. Where a foreign class has a hyper-parameter of
            the same name, the group key of ours gets the prefix ``sam_``.
        rho: Radius of the perturbation, >= 0: its Euclidean norm, in units of the parameters;
            with ``adaptive`` its norm relative to the parameters, dimensionless. 0 does not
            perturb, at the price of the second evaluation."""

COMMON_OPTIONS = """\
adaptive: Scale the perturbation by w^2 elementwise, on every parameter. Keeps a copy of w
            during the perturbed evaluation.
        eps: Added to the gradient norm, >= 0. Adam's own eps is passed as
            ``functools.partial(torch.optim.Adam, eps=...)`` or in the groups.
        max_grad_norm: Clip each gradient to this global norm (over the parameters of this
            optimizer) when it enters the update; the perturbation uses the unclipped one.
            None does not clip.
        check_finite: Read the second gradient once more to skip a step in which it is not finite.
            Always on with ``max_grad_norm``. Without it a non-finite second gradient enters the
            update as in ``torch.optim``; a non-finite first one always skips the step.
        restore: ``"recompute"`` gets w back from p and g1 by one multiply-add, which costs no
            memory and is off by at most one unit in the last place of p, mostly by nothing.
            ``"backup"`` keeps a copy and is exact; it is taken without asking for ``adaptive`` and
            for 16-bit parameters.
        backend: ``"auto"`` or the name of a backend (``python -m wsam_fused`` lists them).
        model: Keep the BatchNorm running statistics of this module out of the perturbed
            evaluation.
        **base_kwargs: Arguments of the base optimizer's class, such as ``lr``.

    Raises:
        TypeError: ``base_optimizer`` is no optimizer, or a parameter is complex.
        ValueError: An argument is out of its range, which the message states.
        RuntimeError: The backend asked for is not available."""

_Class = TypeVar("_Class", bound=type)


def documented(method: _Class) -> _Class:
    """Fill the shared texts into a method's docstring and show its whole signature."""
    text = inspect.getdoc(method) or ""
    method.__doc__ = text.replace("{common_arguments}", _dedented(COMMON_ARGUMENTS)).replace(
        "{common_options}", _dedented(COMMON_OPTIONS)
    )
    own = inspect.signature(vars(method)["__init__"]).parameters
    shared = inspect.signature(vars(method.__mro__[1])["__init__"]).parameters
    fixed = [p for name, p in own.items() if name not in ("self", "kwargs")]
    options = [p for name, p in shared.items() if name not in ("self", "own", *own)]
    method.__signature__ = inspect.Signature([*fixed, *options])  # type: ignore[attr-defined]
    return method


def _dedented(text: str) -> str:
    return text.replace("\n    ", "\n")
