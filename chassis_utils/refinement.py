"""Gradient refinement of an adapter: Adam on its factors, or Gauss-Newton steps in closed form.

Adam moves every entry of a factor by about its rate in each step, whatever the gradient's
size, so the rate must be small beside the factor's own entries: `relative` rates are in
units of each factor's root mean square. A Gauss-Newton step replaces the mean KL by its
quadratic model at the current adapter q, whose curvature K = E[W^T (diag q - q q^T) W] and
targets h_e = edit + s K^-1 W^T (p - q) make it one more reduced-rank regression; the step
length s is searched on the training KL. Both stop where prompts kept out of the steps say so.
"""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float64, Shaped
from torch import Tensor

from chassis_utils.adapters import Adapter, at_rank
from chassis_utils.metrics import kl_divergence
from chassis_utils.models import Head
from chassis_utils.moments import Moments
from chassis_utils.regression import reduced_rank, solve_symmetric

LENGTHS = (1.0, 0.5, 0.25, 0.125)  # of a Gauss-Newton step, in the order tried
DAMPING = 1e-9  # of the curvature, times its mean eigenvalue: only keeps the system solvable


@dataclass(frozen=True)
class Examples:
    """States of the head's input and the expert's logits on the same prompts."""

    h: Shaped[Tensor, "n d"]
    logits: Shaped[Tensor, "n vocab"]

    def kl(self, adapter: Adapter, head: Head) -> float:
        """Mean KL(expert || adapted), nats."""
        return float(kl_divergence(self.logits, adapter.logits(self.h, head)).mean())


@dataclass(frozen=True)
class Refined:
    """The adapter that was kept, and the path to it (nats; entry 0 is the start)."""

    adapter: Adapter
    train: list[float]  # mean KL over each pass for Adam, after each step for Gauss-Newton
    held_out: list[float]


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

    `stopped` keeps the pass with the least KL on `held_out`, the start among them; otherwise
    the last pass is kept, as the first study did.
    """
    factors = [factor.float().clone().requires_grad_() for factor in _factors(start)]
    scale = [float(factor.detach().square().mean().sqrt()) if relative else 1.0 for factor in factors]
    optimizer = torch.optim.Adam([{"params": [f], "lr": rate * s} for f, s in zip(factors, scale, strict=True)])
    generator = torch.Generator().manual_seed(seed)
    trail, found = [train.kl(start, head)], [(held_out.kl(start, head), start)]
    for _ in range(passes):
        order = torch.randperm(len(train.h), generator=generator).split(batch)
        losses = []
        for rows in order:
            log_p = train.logits[rows].float().log_softmax(-1)
            log_q = _logits(factors, start, head, train.h[rows].float()).log_softmax(-1)
            loss = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        trail.append(math.fsum(losses) / len(losses))
        now = _with_factors(start, factors)
        found.append((held_out.kl(now, head), now))
    kept = min(found, key=lambda pair: pair[0])[1] if stopped else found[-1][1]
    return Refined(kept, trail, [kl for kl, _ in found])


def by_gauss_newton(
    start: Adapter, head: Head, train: Examples, held_out: Examples, penalty: float, *, steps: int = 5
) -> Refined:
    """Reduced-rank regressions on the linearised softmax; `penalty` as in the fit of `start`.

    Ends after `steps`, where no length lowers the training KL, or where the KL on `held_out`
    rises; the adapter with the least KL there is kept. For adapters in state coordinates.
    """
    if start.space != "state":
        raise ValueError("Gauss-Newton steps edit the state: give an adapter in state coordinates")
    trail, found = [train.kl(start, head)], [(held_out.kl(start, head), start)]
    for _ in range(steps):
        best = _step(found[-1][1], head, train, penalty, trail[-1])
        if best is None:
            break
        trail.append(best[0])
        found.append((held_out.kl(best[1], head), best[1]))
        if found[-1][0] > found[-2][0]:
            break
    return Refined(min(found, key=lambda pair: pair[0])[1], trail, [kl for kl, _ in found])


def _step(current: Adapter, head: Head, train: Examples, penalty: float, kl: float) -> tuple[float, Adapter] | None:
    """The first length at which the training KL is below `kl`, halved on while that helps; None where none is."""
    change, curvature = _newton(current, head, train)
    best = None
    for length in LENGTHS:
        moments = Moments.of(train.h, current.edit(train.h) + length * change)
        tried = at_rank(reduced_rank(moments, penalty, curvature), current.rank, head)
        reached = train.kl(tried, head)
        if reached < (kl if best is None else best[0]):
            best = (reached, tried)
        elif best is not None:
            break
    return best


def _newton(current: Adapter, head: Head, train: Examples) -> tuple[Float64[Tensor, "n d"], Float64[Tensor, "d d"]]:
    """K^-1 W^T (p - q) of each prompt, and the mean curvature K."""
    w = head.weight * head.scale
    q = current.logits(train.h, head).softmax(-1)
    p = train.logits.softmax(-1)
    slope = ((p - q).to(w.dtype) @ w).double()
    mean_states = (q.to(w.dtype) @ w).double()
    curvature = (w.double().T * q.double().mean(0)) @ w.double() - mean_states.T @ mean_states / len(q)
    eye = torch.eye(len(curvature), dtype=torch.float64)
    damped = curvature + DAMPING * curvature.trace() / len(curvature) * eye
    return solve_symmetric(damped, slope.T).T, damped


def _factors(adapter: Adapter) -> list[Tensor]:
    """U, log S, V and shift with U and V orthonormal: the singular value decomposition of A B^T."""
    q_down, r_down = torch.linalg.qr(adapter.down)
    q_up, r_up = torch.linalg.qr(adapter.up)
    u, s, vt = torch.linalg.svd(r_down @ r_up.T)
    return [q_down @ u, s.log(), q_up @ vt.T, adapter.shift]


def _with_factors(adapter: Adapter, factors: list[Tensor]) -> Adapter:
    u, log_s, v, shift = (factor.detach().double() for factor in factors)
    return replace(adapter, down=u * log_s.exp(), up=v, shift=shift)


def _logits(factors: list[Tensor], adapter: Adapter, head: Head, h: Tensor) -> Tensor:
    u, log_s, v, shift = factors
    edit = ((h @ u) * log_s.exp()) @ v.T + shift
    return head.finish(head.product(h + edit) if adapter.space == "state" else head.product(h) + edit)
