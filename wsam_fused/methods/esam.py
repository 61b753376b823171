"""ESAM: efficient sharpness-aware minimization."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from wsam_fused.arguments import number
from wsam_fused.bases import BaseOptimizer
from wsam_fused.documentation import documented
from wsam_fused.per_sample import (
    LossesFn,
    PerSampleOptimizer,
    frozen,
    losses_of,
    losses_with_graph,
)
from wsam_fused.random_state import RandomState
from wsam_fused.schedules import Schedule


@documented
class ESAM(PerSampleOptimizer):
    """SAM for less: perturb some of the tensors, and differentiate again for some of the samples.

    Math:
        g1 = gradient at w of the active tensors: each with probability beta, all at step 1
        e  = (rho / beta) M g1 / (sqrt(sum of M g1^2) + eps), 0 for the others
        S  = the round(gamma B) samples whose loss rises most from w to w + e, at least one
        g2 = gradient at w + e of the mean loss of S
        w  <- base(w, g2)                               row: h = g2; M: the geometry's metric

    The first backward computes weight gradients for active tensors only, the second forward and
    backward run on S; what comes on top is a forward without gradient at w + e. Under
    DistributedDataParallel every rank selects among its own samples, and the first backward is
    cheaper only with ``perturb_scope="local"``, which is what the authors' code does: else the
    model would wait for the gradients that are left out.

    Args:
        {common_arguments}
        beta: Probability that a tensor is perturbed, in (0, 1]. 1 perturbs all. A group key.
        gamma: Share of the samples in the second evaluation, in (0, 1]. 1 takes all. A group key,
            of which the first group's counts.
        seed: Of the choice of active tensors, a whole number >= 0, the same on all ranks. A group
            key, likewise.
        {common_options}

    ``replay_rng=True`` is refused: the second evaluation has other samples, and so other masks.

    Differs from the authors' code:
        At least one tensor is active. S has gamma B samples, in the authors' code one less, and
        none if gamma B < 2. Their eps is 1e-7. The losses that are compared come from the same
        dropout masks, and ``requires_grad`` is left as found.

    Reference:
        Du, Yan, Feng, Zhou, Zhen, Goh, Tan: Efficient Sharpness-aware Minimization for Improved
        Training of Neural Networks. ICLR 2022. arXiv:2110.03141.

    Example:
        >>> model = torch.nn.Linear(3, 1)
        >>> x, y = torch.randn(8, 3), torch.randn(8, 1)
        >>> opt = ESAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1)
        >>> def losses_fn(index=None):
        ...     inputs, targets = (x, y) if index is None else (x[index], y[index])
        ...     return (model(inputs) - targets).square().sum(1)
        >>> loss = opt.step(losses_fn)
    """

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: BaseOptimizer = torch.optim.SGD,
        *,
        rho: float | Schedule = 0.05,
        beta: float = 0.5,
        gamma: float = 0.5,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("replay_rng"):
            raise ValueError(
                "replay_rng is True, expected False: the second evaluation of ESAM has fewer "
                "samples, for which the same random numbers are not the same masks"
            )
        own = {"rho": rho, "beta": beta, "gamma": gamma, "seed": seed}
        super().__init__(params, base_optimizer, own, **kwargs)

    @classmethod
    def _check_own(cls, own: dict[str, Any]) -> None:
        super()._check_own(own)
        number("beta", own["beta"], 0.0, 1.0, low_included=False)
        number("gamma", own["gamma"], 0.0, 1.0, low_included=False)

    def _check_values(self, group: dict[str, Any]) -> None:
        super()._check_values(group)
        if group.get("maximize"):
            raise ValueError("maximize is True, which ESAM does not support; negate the losses")

    def _places(self, group: dict[str, Any]) -> dict[str, Any]:
        places = super()._places(group)
        beta = number("beta", places["beta"], 0.0, 1.0, low_included=False)
        return {**places, "rho": places["rho"] / beta}

    def _sharpness_aware_step(self, losses_fn: LossesFn) -> tuple[Tensor, Tensor]:
        randomness = RandomState(self._params())
        losses = self._differentiate(losses_fn)
        self._go_to_ascent_point()
        selected, perturbed = None, None
        count = len(losses)
        wanted = max(1, int(self.own(self.param_groups[0], "gamma") * count + 0.5))
        if wanted < count:
            with randomness.replayed(), torch.no_grad():
                perturbed = losses_of(losses_fn, count=count)
            selected = self._select(perturbed - losses, wanted)
            count = len(selected)
        with self._evaluation(1):
            second = losses_with_graph(losses_fn, index=selected, count=count)
            self._backward(second.mean())
        self._finish()
        return losses.mean(), (second.detach() if perturbed is None else perturbed).mean()

    def _differentiate(self, losses_fn: LossesFn) -> Tensor:
        """Compute the gradients of the active tensors; return all losses at w, detached."""
        inactive = self._inactive()
        if self._replicas.waits_for_every_gradient:
            losses = losses_with_graph(losses_fn)
            self._backward(losses.mean())
            for param in inactive:
                param.grad = None
            return losses.detach()
        with self._replicas.evaluation(self, 0):
            return self._differentiate_without(inactive, losses_fn)

    def _differentiate_without(self, inactive: list[Tensor], losses_fn: LossesFn) -> Tensor:
        with frozen(inactive), torch.enable_grad():
            losses = losses_of(losses_fn)
            if losses.requires_grad:
                self._backward(losses.mean())
                return losses.detach()
        # Either there is no graph at all, or the active tensors have no part in the loss.
        losses = losses_with_graph(losses_fn)
        self._backward(losses.mean())
        return losses.detach()

    def _inactive(self) -> list[Tensor]:
        """Draw the tensors that are not perturbed in this step."""
        params = [param for param in self._params() if param.requires_grad]
        if self._steps() < self._every or not params:  # the first step that perturbs
            return []
        beta = {p: self.own(group, "beta") for group in self.param_groups for p in group["params"]}
        generator = torch.Generator("cpu").manual_seed(self._seed())
        draws = torch.rand(len(params), generator=generator, device="cpu").tolist()
        draws = [draw / beta[param] for param, draw in zip(params, draws, strict=True)]
        least = min(draws)  # at least one tensor is active
        return [p for p, draw in zip(params, draws, strict=True) if draw >= 1 and draw > least]

    def _select(self, rises: Tensor, wanted: int) -> Tensor:
        """Return the samples of the second evaluation, in the order of the batch."""
        return rises.topk(wanted).indices.sort().values
