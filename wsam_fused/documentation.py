"""The documentation of the arguments that all methods share, written once."""

from __future__ import annotations

import inspect
from typing import TypeVar

COMMON_ARGUMENTS = """\
params: Parameters, named parameters or parameter groups, as ``torch.optim`` takes them. A group
            may have its own values of the method's hyper-parameters and of the base optimizer's.
            DTensors (``fully_shard``, tensor parallelism) are stepped by the parts that a rank has,
            with norms over all ranks; then all parameters have to be DTensors. Weights that FSDP2
            keeps gathered are gathered again after each move, if the optimizer is built from the
            sharded module's parameters.
        base_optimizer: ``torch.optim.SGD``, ``Adam`` or ``AdamW`` (fused update), any other
            ``torch.optim.Optimizer`` class whose ``step()`` needs no closure (stepped as it is), a
            ``functools.partial`` of a class, or an instance over the same parameters, whose groups
            and state then become this optimizer's. Where a foreign class has a hyper-parameter of
            the same name, the group key of ours gets the prefix ``sam_``.
        rho: Radius of the perturbation, >= 0: its norm in the geometry, in units of the parameters
            for the Euclidean one, relative to them for the adaptive one. 0 does not perturb, at the
            price of the second evaluation. Or a schedule: a function of the step (from 1), or one
            of :mod:`wsam_fused.schedules`."""

COMMON_OPTIONS = """\
geometry: The metric M of the perturbation e = rho M g1 / sqrt(sum of M g1^2):
            ``"euclidean"`` 1; ``"adaptive"`` (|w| + eta)^2, elementwise (ASAM); ``"fisher"``
            1 / (1 + eta g1^2), with g1 the mean gradient (Fisher SAM). All but the first keep a
            copy of w during the perturbed evaluation. A group key.
        eta: Of the metric, >= 0. By default 0.01 for ``"adaptive"``, 1 for ``"fisher"``. A group
            key.
        adaptive: Short for ``geometry="adaptive", eta=0.0``, which is what the widely used PyTorch
            port computes.
        only_weights: Use the metric only for parameters whose name contains "weight", and 1 for
            the others, as the ASAM authors do (normalization weights yes, biases no). Needs
            ``model.named_parameters()``.
        every: Make only each so many-th step a sharpness-aware one, the others steps of the base
            optimizer with one evaluation.
        eps: Added to the gradient norm, >= 0. Adam's own eps is passed as
            ``functools.partial(torch.optim.Adam, eps=...)`` or in the groups.
        max_grad_norm: Clip each gradient to this global norm (over the parameters of this
            optimizer) when it enters the update; the perturbation uses the unclipped one.
            None does not clip.
        check_finite: Read the later gradients once more to skip a step in which one is not finite.
            Always on with ``max_grad_norm``, with a GradScaler and where the method needs their
            norms anyway. A step that is skipped leaves states as they were, bit for bit, and so w
            after a non-finite first gradient or where ``restore`` keeps a copy. Without
            it a non-finite later gradient enters the update as in ``torch.optim``; a non-finite
            first one always skips the step.
        restore: ``"recompute"`` gets w back from p and g1 by one multiply-add, which costs no
            memory and is off by at most one unit in the last place of p, mostly by nothing.
            ``"backup"`` keeps a copy and is exact; it is taken without asking for other geometries
            than the Euclidean, for 16-bit parameters and with ``perturb_scope="local"``.
        master_weights: Keep the weights of bfloat16 and float16 parameters in the state, in
            float32 (``"master_weight"``): steps lose nothing, the parameters are their rounded
            copy, and the perturbed evaluation needs no other. What somebody else writes to a
            parameter is taken over; not through ``.data``, which autograd does not notice.
        state_dtype: Of the states of bfloat16 and float16 parameters: ``"float32"`` or
            ``"parameter"``, which is theirs. Wider parameters have states of their own dtype.
        stochastic_rounding: Round what is stored in bfloat16, parameters and states, up or down
            with the probability that the value asks for, so that updates below half a spacing
            are not lost. The choice follows from the parameter, its element and its step count:
            replicas round alike. Not with ``master_weights``, nor for float16.
        backend: ``"auto"`` or the name of a backend (``python -m wsam_fused`` lists them).
        model: Keep the BatchNorm running statistics of this module out of the perturbed
            evaluations.
        replay_rng: Let the perturbed evaluations draw the random numbers of the first one, such as
            dropout masks, from torch's default generators (of the CPU and of the parameters' CUDA
            devices; no others). The generators go on afterwards as if only the first evaluation had
            drawn. Call by call, put each evaluation into ``with opt.same_randomness():``.
        perturb_scope: Whose gradient perturbs the replicas of a data-parallel model. ``"global"``:
            all perturb alike, by the averaged one. ``"local"``: each by that of its own batch, as
            the papers' m-sharpness has it; the first evaluation is not averaged, and w is restored
            from a copy, as with ``restore="backup"``, so that replicas stay equal bit by bit
            (docs/methods.md says what is averaged). Needs ``model=`` with the
            DistributedDataParallel module; or, call by call, a first forward and backward (for
            GSAM and BSAM, which average their h, all of them) within its ``no_sync()``, unless
            ``is_plain_step``.
        process_group: The ranks that average with ``"local"``; those of ``model`` by default, or
            all. Copies of the optimizer do not keep it.
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
    base = next(c for c in method.__mro__[1:] if "__init__" in vars(c))
    shared = inspect.signature(vars(base)["__init__"]).parameters
    fixed = [p for name, p in own.items() if name not in ("self", "kwargs")]
    options = [p for name, p in shared.items() if name not in ("self", "own", *own)]
    method.__signature__ = inspect.Signature([*fixed, *options])  # type: ignore[attr-defined]
    return method


def _dedented(text: str) -> str:
    return text.replace("\n    ", "\n")
