"""Gradient refinement of an adapter: Adam on its factors, or Gauss-Newton steps in closed form.

Adam moves every entry of a factor by about its rate in each step, whatever the gradient's size, so the rate must be
small beside the factor's own entries: `relative` rates are in units of the root mean square of U, of V and, for the
shift, of the edit. A Gauss-Newton step replaces the mean KL by its quadratic model at the current adapter q, whose
curvature K = E[W^T (diag q - q q^T) W] and targets h_e = edit + s K^-1 W^T (p - q) make it one more reduced-rank
regression; the step length s is searched on the training KL. Prompts kept out of the steps have the last word: what
does not lower their KL by more than a standard error is not kept.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from jaxtyping import Float64, Shaped
from torch import Tensor
from torch.nn.functional import kl_div

from chassis_utils.adapters.adapter import Adapter
from chassis_utils.adapters.fit import fit_moments
from chassis_utils.linalg.moments import Moments
from chassis_utils.linalg.regression import solve_symmetric
from chassis_utils.lm.model import Head
from chassis_utils.metrics import Reference, clearly_lower

LENGTHS = (1.0, 0.5, 0.25, 0.125)  # of a Gauss-Newton step, in the order tried
DAMPING = 1e-9  # of the curvature, times its mean eigenvalue: only keeps the system solvable


@dataclass(frozen=True)
class Examples:
    """States of the head's input and the expert's logits on the same prompts."""

    h: Shaped[Tensor, "n d"]
    logits: Shaped[Tensor, "n vocab"]
    groups: Sequence[str] | None = None  # prompts of one template or document are not independent
    _products: dict[str, Tensor] = field(default_factory=dict, init=False)  # by the fingerprint of a head

    @cached_property
    def reference(self) -> Reference:
        """The expert as what adapters are measured against."""
        return Reference(self.logits)

    @cached_property
    def probabilities(self) -> Shaped[Tensor, "n vocab"]:
        """The expert's."""
        return self.logits.softmax(-1)

    def product(self, head: Head) -> Shaped[Tensor, "n vocab"]:
        """What the head makes of the states: kept, so that another adapter costs what its factors cost."""
        if head.fingerprint not in self._products:
            self._products[head.fingerprint] = head.product(self.h)
        return self._products[head.fingerprint]

    def adapted(self, adapter: Adapter, head: Head) -> Shaped[Tensor, "n vocab"]:
        """The adapted logits from `product`; `ValueError` for a head that the adapter was not fitted to."""
        adapter.check(head)
        code, dtype = self.h.double() @ adapter.down, head.weight.dtype
        mean = code.mean(0)  # goes to the shift, which may cancel most of it, before either is rounded
        parts = (code - mean, adapter.up, adapter.shift + adapter.up @ mean)
        return _logits(adapter, head, self.product(head), *(part.to(dtype) for part in parts))

    def kl(self, adapter: Adapter, head: Head) -> Float64[Tensor, "n"]:
        """KL(expert || adapted) of each prompt, nats."""
        return self.reference.kl(adapter.logits(self.h, head))

    def mean_kl(self, adapter: Adapter, head: Head) -> float:
        """Its mean, to search by: from `adapted`."""
        return float(self.reference.kl(self.adapted(adapter, head)).mean())


@dataclass(frozen=True)
class Refined:
    """The adapter that was kept, and the path to it (nats; entry 0 is the start)."""

    adapter: Adapter
    train: list[float]  # mean KL over each pass for Adam, after each step for Gauss-Newton
    held_out: list[float]

    @classmethod
    def of(cls, adapters: list[Adapter], train: list[float], head: Head, held_out: Examples, last: bool) -> "Refined":
        """Keep the `last`, or the one of least KL on `held_out` among those clearly below the start there.

        The untouched base is kept where it is closer to the expert than even that one.
        """
        kl = [held_out.kl(adapter, head) for adapter in adapters]
        means = [float(values.mean()) for values in kl]
        if last:
            return cls(adapters[-1], train, means)
        better = [k for k, values in enumerate(kl) if clearly_lower(values, kl[0], held_out.groups)]
        kept = min(better, key=lambda k: means[k], default=0)
        untouched = Adapter.untouched(head, adapters[kept].rank)
        helps = means[kept] < float(held_out.kl(untouched, head).mean())
        return cls(adapters[kept] if helps else untouched, train, means)


def by_adam(
    start: Adapter,
    head: Head,
    train: Examples,
    held_out: Examples,
    rate: float,
    *,
    relative: bool = True,
    stopped: bool = True,
    passes: int = 50,
    batch: int = 32,
    seed: int = 0,
) -> Refined:
    """Adam on U, log S, V and the shift of `start`; float32, batches in a random order of `seed`.

    Tokens that an adapter in vocabulary coordinates leaves alone stay so. `stopped` keeps the pass that `Refined.of`
    finds best on `held_out`; otherwise the last is kept, as the CHASSIS study did.
    """
    factors, sizes = _prepared(start, train)
    rates = [rate * size for size in (sizes if relative else [1.0] * len(sizes))]
    optimizer = torch.optim.Adam([{"params": [factor], "lr": lr} for factor, lr in zip(factors, rates, strict=True)])
    generator = torch.Generator().manual_seed(seed)
    trail, adapters = [train.mean_kl(start, head)], [start]
    whole = head.to(torch.float32)
    h, products, expert = train.h.float(), whole.product(train.h), train.logits.float().log_softmax(-1)
    for _ in range(passes):
        order = torch.randperm(len(train.h), generator=generator).split(batch)
        losses = []
        for rows in order:
            code = (h[rows] @ factors[0]) * factors[1].exp()
            adapted = _logits(start, whole, products[rows], code, *factors[2:]).log_softmax(-1)
            loss = kl_div(adapted, expert[rows], reduction="batchmean", log_target=True)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        trail.append(math.fsum(losses) / len(losses))
        adapters.append(_with_factors(start, factors))
    return Refined.of(adapters, trail, head, held_out, last=not stopped)


def by_gauss_newton(
    start: Adapter, head: Head, train: Examples, held_out: Examples, penalty: float, *, steps: int = 4
) -> Refined:
    """Reduced-rank regressions on the linearised softmax; `penalty` as in the fit of `start`.

    Ends after `steps`, or where no length lowers the training KL; what is kept `held_out` decides (`Refined.of`). For
    adapters in state coordinates, else `ValueError`.
    """
    if start.space != "state":
        raise ValueError("Gauss-Newton steps edit the state: give an adapter in state coordinates")
    trail, adapters = [train.mean_kl(start, head)], [start]
    for _ in range(steps):
        step = _step(adapters[-1], head, train, penalty, trail[-1])
        if step is None:
            break
        trail.append(step[0])
        adapters.append(step[1])
    return Refined.of(adapters, trail, head, held_out, last=False)


def _step(current: Adapter, head: Head, train: Examples, penalty: float, kl: float) -> tuple[float, Adapter] | None:
    """The first length at which the training KL is below `kl`, halved on while that helps; None where none is."""
    change, curvature = _newton(current, head, train)
    best = None
    for length in LENGTHS:
        moments = Moments.of(train.h, current.edit(train.h) + length * change)
        fitted = fit_moments([moments], head, curvature, penalty, current.intercept)
        tried = fitted.at(current.rank)
        reached = train.mean_kl(tried, head)
        if reached < (kl if best is None else best[0]):
            best = (reached, tried)
        elif best is not None:
            break
    return best


def _newton(current: Adapter, head: Head, train: Examples) -> tuple[Float64[Tensor, "n d"], Float64[Tensor, "d d"]]:
    """K^-1 W^T (p - q) of each prompt, and the mean curvature K; `gain` is the slope of a softcap."""
    w = head.weight * head.scale
    logits = train.adapted(current, head)
    q, gain = logits.softmax(-1), 1.0 if head.softcap is None else 1 - (logits / head.softcap).square()
    slope = (((train.probabilities - q) * gain).to(w.dtype) @ w).double()
    pulled = q * gain
    mean_states = (pulled.to(w.dtype) @ w).double()
    shared = (pulled * gain).mean(0, dtype=torch.float64)
    curvature = (w.double().T * shared) @ w.double() - mean_states.T @ mean_states / len(q)
    eye = torch.eye(len(curvature), dtype=torch.float64)
    damped = curvature + DAMPING * curvature.trace() / len(curvature) * eye
    return solve_symmetric(damped, slope.T).T, damped


def _factors(adapter: Adapter) -> list[Tensor]:
    """U, log S, V and shift with U and V orthonormal: the singular value decomposition of A B^T."""
    q_down, r_down = torch.linalg.qr(adapter.down)
    q_up, r_up = torch.linalg.qr(adapter.up)
    u, s, vt = torch.linalg.svd(r_down @ r_up.T)
    floor = torch.finfo(torch.float32).eps * float(s.max()) if len(s) else 0.0  # a zero has no logarithm
    return [q_down @ u, s.clamp_min(floor or 1e-12).log(), q_up @ vt.T, adapter.shift]


def _prepared(start: Adapter, train: Examples) -> tuple[list[Tensor], list[float]]:
    """U, log S, V and the shift, to be trained, and what relative rates are shares of: root mean squares, one for S."""
    factors = [factor.float().clone().requires_grad_() for factor in _factors(start)]
    used = (start.up != 0).any(1) | (start.shift != 0) | (start.space == "state")
    for factor, mask in ((factors[2], used[:, None]), (factors[3], used)):
        factor.register_hook(lambda gradient, mask=mask: gradient * mask)  # Adam leaves alone what has no gradient
    parts = (factors[0].detach(), factors[2].detach()[used], start.edit(train.h)[:, used])
    first, *others = (float(part.square().mean().sqrt()) for part in parts)
    return factors, [first, 1.0, *others]


def _with_factors(adapter: Adapter, factors: list[Tensor]) -> Adapter:
    u, log_s, v, shift = (factor.detach().double() for factor in factors)
    return replace(adapter, down=u * log_s.exp(), up=v, shift=shift)


def _logits(adapter: Adapter, head: Head, product: Tensor, code: Tensor, up: Tensor, shift: Tensor) -> Tensor:
    """The adapted logits; `product` is what the head makes of the states, so that they cost what the factors do."""
    rows = torch.vstack([up.T, shift])
    if adapter.space == "state":
        rows = rows @ head.weight.T  # several times as fast as its transpose, and so is its gradient
    product = torch.addmm(product + rows[-1], code, rows[:-1])
    return head.finish(product if adapter.intercept is None else product + adapter.intercept.to(product.dtype))
