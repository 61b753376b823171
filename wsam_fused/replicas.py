"""Replicas of a model that perturb by gradients of their own: ``perturb_scope="local"``.

Math, over R ranks, each with a batch of its own:
    g1_r = gradient of rank r's batch at w,   e_r from g1_r alone,   g2_r at w + e_r
    a method that is linear in its gradients:  base(w, row of mean g1_r and mean g2_r)
    one that is not (its coefficients are derived):  base(w, mean of the rows of g1_r and g2_r)

This is m-sharpness with the batch of a rank for a micro-batch. What is averaged is what the update
needs: g2 by DistributedDataParallel in its backward; g1, where the row uses it, here, while the
second evaluation runs; the h of a rank, where its coefficients are derived, here too.

w is restored from a copy: recomputed from another g1 on every rank it would be rounded otherwise
on every rank, and nothing would bring the replicas together again.

Reference: Foret et al., ICLR 2021, section 4 (m-sharpness).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from wsam_fused.arguments import choice
from wsam_fused.averages import Averages, Total, is_distributed
from wsam_fused.backends import BACKENDS
from wsam_fused.distributed import is_dtensor
from wsam_fused.microbatches import combine, poison_of, update_with_h
from wsam_fused.plan import Slot, addresses_of

if TYPE_CHECKING:
    from wsam_fused.engine import StepEngine
    from wsam_fused.optimizer import SharpnessAwareOptimizer

SCOPES = ("global", "local")


class Replicas:
    """What an optimizer does with those of other ranks.

    Args:
        scope: ``"global"`` or ``"local"``.
        group: The ranks; None for those of the model, or all.
        model: Used for its ``no_sync()`` if it is a DistributedDataParallel module.

    Attributes:
        perturb_apart: Whether every rank perturbs by its own gradient.

    Raises:
        TypeError: ``group`` is no process group.
        ValueError: ``scope`` is none of the two, or does not go with the model.
    """

    def __init__(
        self, scope: str, group: dist.ProcessGroup | None, model: nn.Module | None
    ) -> None:
        self.perturb_apart = choice("perturb_scope", scope, SCOPES) == "local"
        if group is not None and not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
            raise TypeError(
                f"process_group is {type(group).__name__}, expected a "
                "torch.distributed.ProcessGroup or None (a rank outside of a group has none)"
            )
        self._given = group
        self._model = model
        self._parallel = model if isinstance(model, DistributedDataParallel) else None
        if self.perturb_apart and self._parallel is not None and self._parallel.static_graph:
            raise ValueError(
                "perturb_scope is 'local' and model has static_graph=True, expected False: its "
                "first evaluation cannot be one within no_sync()"
            )
        self._averages = (Averages(), Averages())
        self._poison: Total | None = None

    def __getstate__(self) -> dict[str, object]:
        # A group is of this process, and averages in progress are of this step.
        return {"apart": self.perturb_apart, "model": self._model}

    def __setstate__(self, state: dict[str, object]) -> None:
        scope = "local" if state["apart"] else "global"
        self.__init__(scope, None, state["model"])  # type: ignore[misc]

    @property
    def knows_ranks(self) -> bool:
        """Whether it has been said which ranks share a batch."""
        return self._given is not None or self._parallel is not None

    @property
    def group(self) -> dist.ProcessGroup:
        """The ranks.

        Raises:
            RuntimeError: There are none yet.
        """
        if self._given is not None:
            return self._given
        if self._parallel is not None:
            found: dist.ProcessGroup = self._parallel.process_group
            return found
        if not is_distributed():
            raise RuntimeError(
                "perturb_scope is 'local', which averages over the ranks of torch.distributed, but "
                "that is not initialized; call torch.distributed.init_process_group() before"
            )
        assert dist.group.WORLD is not None
        return dist.group.WORLD

    def check_params(self, params: Sequence[Tensor]) -> None:
        """Refuse parameters of which a rank has no gradient of its own.

        Raises:
            ValueError: One is a DTensor, and the scope is "local".
        """
        if self.perturb_apart and any(map(is_dtensor, params)):
            raise ValueError(
                "perturb_scope is 'local', expected 'global' for sharded parameters (DTensor): "
                "their gradients are averaged before a rank has them"
            )

    # ---- evaluations -------------------------------------------------------------------------

    def check_closure(self, what: str) -> None:
        """Require what evaluating closures apart needs.

        Raises:
            TypeError: ``model`` is no DistributedDataParallel module.
        """
        if self.perturb_apart and self._parallel is None:
            raise TypeError(
                f"{what} was called with perturb_scope='local' and model is "
                f"{type(self._model).__name__}, expected model=<the DistributedDataParallel "
                "module>, whose no_sync() keeps the first gradients of a rank its own; or call "
                "first_step() after a forward and backward within no_sync(), and second_step()"
            )

    def unsynced(self) -> AbstractContextManager[object]:
        """Keep the gradients of an evaluation apart, with the scope "local"."""
        if not self.perturb_apart or self._parallel is None:
            return nullcontext()
        apart: AbstractContextManager[object] = self._parallel.no_sync()
        return apart

    def evaluation(
        self, optimizer: SharpnessAwareOptimizer, number: int
    ) -> AbstractContextManager[object]:
        """Let DistributedDataParallel average evaluation ``number`` (from 0) of a step, or not."""
        apart = self.perturb_apart and not optimizer.is_plain_step
        if apart and (number == 0 or _derives(optimizer)):
            return self.unsynced()
        return nullcontext()

    @property
    def waits_for_every_gradient(self) -> bool:
        """Whether a backward that leaves parameters out may stop DistributedDataParallel.

        It waits for the gradients of all parameters that required one when it was made.
        """
        return is_distributed() and not self.perturb_apart

    # ---- which parameters have gradients -----------------------------------------------------

    def match_gradients(self, optimizer: SharpnessAwareOptimizer) -> None:
        """Give parameters that only other ranks use a gradient of 0.

        Raises:
            RuntimeError: There are no ranks to average over.
        """
        if self.perturb_apart:
            assert self.group is not None  # asked for before the weights are perturbed
            params = optimizer._params()
            for param in self._used_elsewhere(params, [p.grad is not None for p in params]):
                dtype = getattr(param, "grad_dtype", None) or param.dtype
                param.grad = torch.zeros_like(param, dtype=dtype)

    def _used_elsewhere(self, params: Sequence[Tensor], present: Sequence[bool]) -> list[Tensor]:
        """Return the parameters that only other ranks use.

        There are some only if the model says so (``find_unused_parameters``). Then the host has to
        know them and waits for the other ranks, as DistributedDataParallel does.
        """
        if self._parallel is None or not self._parallel.find_unused_parameters:
            return []
        used = torch.tensor(present, dtype=torch.int32, device=params[0].device)
        dist.all_reduce(used, dist.ReduceOp.MAX, group=self.group)
        triples = zip(params, present, used.tolist(), strict=True)
        return [param for param, here, anywhere in triples if anywhere and not here]

    # ---- averages ----------------------------------------------------------------------------

    @torch.no_grad()
    def begin(self, optimizer: SharpnessAwareOptimizer, engine: StepEngine) -> None:
        """Begin to average what the update needs of g1; the weights have been perturbed by it."""
        if not self.perturb_apart:
            return
        if optimizer.uses_first_gradient and not _derives(optimizer):
            self._start_first(engine)
        else:  # of g1 the other ranks need to know only whether it was finite
            self._poison = Total(poison_of(engine), self.group)

    def _start_first(self, engine: StepEngine) -> None:
        places = [
            (tensors.grads[0], i, grad)
            for tensors in engine.lists.lists
            for i, grad in enumerate(tensors.grads[0])
            if grad is not None
        ]
        means = self._averages[0].start([grad for _, _, grad in places], self.group)
        for (grads, i, _), mean in zip(places, means, strict=True):
            grads[i] = mean
        for tensors in engine.lists.lists:
            tensors.addresses[0] = addresses_of(tensors.grads[0])
            BACKENDS[tensors.key.backend].bind(tensors, 0, tensors.addresses[0])

    def wait(self) -> Tensor | None:
        """Wait for what :meth:`begin` has begun.

        Returns:
            A scalar, NaN if g1 was not finite on some rank and 0 otherwise; None if g1 itself has
            been averaged.
        """
        self._averages[0].wait()
        poison, self._poison = self._poison, None
        return None if poison is None else poison.wait()

    def average(
        self, params: Sequence[Tensor], totals: Sequence[dict[Tensor, Tensor]]
    ) -> Sequence[dict[Tensor, Tensor]]:
        """Average totals by parameter, of at most two kinds, over the ranks; wait for them.

        With the scope "global" they are returned as they are.
        """
        if not self.perturb_apart:
            return totals
        found = []
        for averages, total in zip(self._averages, totals, strict=False):
            for param in self._used_elsewhere(params, [param in total for param in params]):
                total[param] = torch.zeros_like(param)
            have = [param for param in params if param in total]
            means = averages.start([total.pop(param) for param in have], self.group)
            found.append(dict(zip(have, means, strict=True)))
        for averages in self._averages:
            averages.wait()
        return found

    def poisoned_anywhere(self, poison: Tensor) -> Tensor:
        """Return the sum of a scalar over the ranks, with the scope "global" itself."""
        if not self.perturb_apart:
            return poison
        return Total(poison, self.group).wait()

    # ---- samples -----------------------------------------------------------------------------

    def softmax(self, values: Tensor) -> tuple[Tensor, int]:
        """Return the softmax over the samples of all ranks that share a perturbation.

        Args:
            values: Of the samples of this rank, a floating tensor ``[B]``.

        Returns:
            The weights of the samples of this rank, and over how many ranks they add up to 1.
        """
        if self.perturb_apart or not self.knows_ranks:
            return values.softmax(0), 1
        largest = values.max()
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        weights = (values - largest).exp()
        total = weights.sum()
        dist.all_reduce(total, group=self.group)
        return weights / total, dist.get_world_size(self.group)


def complete_apart(optimizer: SharpnessAwareOptimizer, engine: StepEngine) -> None:
    """Take the last gradients of a rank, and update with what is averaged over the ranks.

    Args:
        optimizer: Whose step it is; its weights are perturbed.
        engine: Its engine, with all gradients but the last.

    Raises:
        RuntimeError: A rank has failed, or a gradient has overwritten another one.
    """
    replicas = optimizer._replicas
    poison = replicas.wait()
    method = optimizer._method_rows()
    if _derives(optimizer):
        assert poison is not None  # g1 is not averaged
        engine.read_next(take=True)
        optimizer._note_scaled(engine)
        total = combine(engine, optimizer._rows(method), method, 1.0, {})
        update_with_h(optimizer, total, poison, is_scaled=False)
        return
    engine.read_next()
    optimizer._note_scaled(engine)
    if poison is None:
        engine.reduce(0)
    else:
        for shared in engine.lists.shared.values():
            shared.scalars[Slot.METRIC_SQ] += poison.to(shared.scalars.device)
    optimizer._update(method, required=optimizer.required)


def _derives(optimizer: SharpnessAwareOptimizer) -> bool:
    return any(row.derive is not None for row in optimizer._method_rows())
