"""The CHASSIS study's lenses and adapters.

Each docstring names the flaw and the function to use instead. Nothing else in the package
depends on this module.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float64, Int, Shaped
from torch import Tensor

from chassis_utils.adapters.adapter import Adapter
from chassis_utils.linalg.regression import LinearMap, RankPath, solve_symmetric
from chassis_utils.lm.model import Head

RIDGE = 1e-3  # added to the Gram matrix of every fit of the CHASSIS study, never chosen
KEPT = 2048 / 32000  # share of the vocabulary that method A edits
ROWS = 256  # targets whose float64 copies are held at once


def layer_lens(h: Shaped[Tensor, "n d"], logits: Shaped[Tensor, "n vocab"]) -> LinearMap:
    """Centred ridge from the states of one layer to the expert's logits, lambda 1e-3.

    Flaw: fitted to three templates it knows nothing of other text, and the penalty, never
    chosen, is nothing against the Gram matrix. Use `adapters.lens.fit_lens` on varied text, whose
    penalty is chosen on held-out groups and whose systems are d x d.
    """
    return _Ridge.of(h)(logits)


def projected_alignment(
    h: Shaped[Tensor, "n d"], expert: Shaped[Tensor, "n d"], basis: Float64[Tensor, "d k"]
) -> LinearMap:
    """Ridge between base and expert states inside an orthonormal basis, lifted back: h -> h_e.

    Flaw: the state itself passes through the k-dimensional basis, so everything outside is
    lost, edited or not. Use a fit of the edit h_e - h, added back to the untouched h.
    """
    inner = _Ridge.of(h.double() @ basis)(expert.double() @ basis)
    return LinearMap(basis @ inner.weight @ basis.T, inner.bias @ basis.T)


def random_basis(width: int, k: int, seed: int = 0) -> Float64[Tensor, "d k"]:
    """An orthonormal basis of a random k-dimensional subspace."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, k, generator=generator, dtype=torch.float64)).Q


@dataclass(frozen=True)
class MethodA:
    """The final-layer lens adapter of every rank: ((h U_r) S_r) V_r^T + d on some of the logits."""

    path: RankPath  # of the map from states to the changes of those logits
    columns: Int[Tensor, "k"]
    head: Head

    def ranks(self, sweep: Sequence[int]) -> list[int]:
        """Those of a sweep that it has: no more than its columns."""
        return [rank for rank in sweep if rank <= len(self.path.singular_values)]

    def at(self, rank: int) -> Adapter:
        """The adapter of one rank, in vocabulary coordinates, zero for all other tokens."""
        part = self.path.at(rank)
        vocabulary = len(self.head.weight)
        up = torch.zeros(vocabulary, rank, dtype=torch.float64).index_copy(0, self.columns, self.path.right[:, :rank])
        shift = torch.zeros(vocabulary, dtype=torch.float64).index_copy(0, self.columns, part.bias)
        return Adapter("vocabulary", self.path.left[:, :rank], up, shift, self.head.fingerprint)


def method_a(
    h: Shaped[Tensor, "n d"], logits: Shaped[Tensor, "n vocab"], head: Head, columns: Int[Tensor, "k"] | None = None
) -> MethodA:
    """Lens by ridge; the columns of largest norm; ridge from h to lens minus head there; plain SVD.

    On a middle layer, as in the study, `head` reads the state without the final norm.
    Flaws: two ridges where one would do; only 6.4 percent of the logits are edited, and those of
    largest norm belong to rare tokens; the SVD is truncated in the wrong norm; the intercept stays
    that of full rank, so truncation moves the mean. Use `adapters.fit.fit_logits`.
    """
    ridge = _Ridge.of(h)
    lens = ridge(logits)
    columns = largest_columns(lens) if columns is None else columns
    kept = LinearMap(lens.weight[:, columns], lens.bias[columns])
    part = replace(head, weight=head.weight[columns], bias=None if head.bias is None else head.bias[columns])
    own = ridge(part(h))
    # the second ridge of what is linear in h: X^T X = G - lambda, so that none of its targets need be computed
    weight = (kept.weight - RIDGE * ridge.solve(kept.weight) - own.weight) / head.scale
    mean = ridge.mean[None]
    bias = ((kept(mean) - own(mean)) / head.scale - mean @ weight)[0]
    return MethodA(_truncated(LinearMap(weight, bias)), columns, head)


def largest_columns(lens: LinearMap) -> Int[Tensor, "k"]:
    """The tokens whose columns of a lens have the largest norm: `KEPT` of the vocabulary."""
    count = max(1, round(KEPT * lens.weight.shape[1]))
    return lens.weight.norm(dim=0).topk(count).indices


def truncated_ridge(x: Shaped[Tensor, "n p"], y: Shaped[Tensor, "n q"]) -> RankPath:
    """Ridge, then the plain singular value decomposition of its weight; the intercept of full rank for all ranks.

    Flaws: see `method_a`. Use `regression.reduced_rank`.
    """
    return _truncated(_Ridge.of(x)(y))


def _truncated(fit: LinearMap) -> RankPath:
    v, s, ut = torch.linalg.svd(fit.weight.T, full_matrices=False)  # of the tall one: half the time of the wide one
    return RankPath(ut.T * s, v, s, torch.zeros_like(fit.weight[:, 0]), fit.bias)


def hidden_to_hidden(h: Shaped[Tensor, "n d"], expert: Shaped[Tensor, "n d"]) -> RankPath:
    """Method B: the truncated ridge A_r from h to h_e, applied as h + h A_r + b.

    Flaw: A is already the identity plus the edit, so h is counted twice. Use
    `adapters.fit.fit_states`, which fits the edit h_e - h.
    """
    return truncated_ridge(h, expert)


def as_state_edit(adapter: Adapter, head: Head, inverse: bool = False) -> Adapter:
    """Changes of some logits as an edit of the state, by the transpose of their rows of the head.

    Flaw: the transpose is no inverse, it scales the edit by the squared singular values of
    those rows. `inverse` takes the pseudo-inverse instead. Where blocks follow, both take the
    state for the last one: use `lm.last_token.pull_back`.
    """
    kept = (adapter.up != 0).any(1) | (adapter.shift != 0)
    w = head.weight[kept].double()
    factors = w.T @ torch.cat([adapter.up[kept], adapter.shift[kept, None]], dim=1)
    if inverse:
        factors = solve_symmetric(w.T @ w, factors)
    return Adapter("state", adapter.down, factors[:, :-1], factors[:, -1], adapter.head_fingerprint)


@dataclass(frozen=True)
class _Ridge:
    """Centred ridge from the same inputs to any targets."""

    mean: Float64[Tensor, "p"]
    centred: Float64[Tensor, "n p"]
    gram: Float64[Tensor, "p p"]  # with the penalty on its diagonal

    @classmethod
    def of(cls, x: Shaped[Tensor, "n p"]) -> "_Ridge":
        mean = x.double().mean(0)
        centred = x.double() - mean
        return cls(mean, centred, centred.T @ centred + RIDGE * torch.eye(x.shape[1], dtype=torch.float64))

    def __call__(self, y: Shaped[Tensor, "n q"]) -> LinearMap:
        """The targets, a few rows at a time: a float64 copy of all would spend its time on memory."""
        cross, y_sum = (torch.zeros(rows, y.shape[1], dtype=torch.float64) for rows in (len(self.mean), 1))
        for inputs, targets in zip(self.centred.split(ROWS), y.split(ROWS), strict=True):
            cross.addmm_(inputs.T, targets.double())
            y_sum += targets.double().sum(0)
        weight = self.solve(cross)
        return LinearMap(weight, y_sum[0] / len(y) - self.mean @ weight)

    def solve(self, cross: Float64[Tensor, "p q"]) -> Float64[Tensor, "p q"]:
        """The weight of given cross products of inputs and targets."""
        return solve_symmetric(self.gram, cross)
