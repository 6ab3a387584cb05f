"""What is removed, folded into what stays, before that is taken out of the source's own tensors.

    reader   W'_k = W_k + W_r M,  M = P + (C_rk - P C_kk) (C_kk + l I)^-1,  C = E[x x^T] on calibration data

k are the entries of a wire that stay, r the others. M is ridge regression of r on k; P, towards which it
is drawn, takes each removed entry from the one kept entry that tells most of it, so that a copy of what stays
is folded without a loss, whatever l is. Where the op has a bias, C is the covariance, and the mean of what M
does not explain goes into the bias: b' = b + W_r (m_r - M m_k).

    norm     g' = g sqrt(v_k / v), v the mean square (of a LayerNorm the variance) of all channels, v_k of
             those that stay, on data; eps' = eps e, with e the mean of v_k / v over norms of the stream.
             Norms that share it and read what is theirs alone, such as those of queries and keys, are given
             sqrt(e v / v_k) times what they were
    tied     the table's columns stay what they are, so the last norm's gain and bias are multiplied by a,
             which minimises E |T f - T_k (a f_k)|^2:  ((T_k^T T_k) o C_kk) a = ((T_k^T T) o C_k) 1
    groups   keys and values of groups that become one: their mean (Ainslie et al. 2023), with data or without
"""

import math
from collections.abc import Callable, Iterator
from functools import lru_cache, partial

import torch
from torch import Tensor

from growth.apply import exact
from growth.architecture import Linear, Norm, Tied
from growth.methods.lemon import scalable, written_for
from growth.plan import Source
from growth.shrinking.bonds import Bonds, Site
from growth.shrinking.calibration import Calibration
from growth.shrinking.keeping import Index, Kept

RIDGE = 1e-4  # l, in units of the mean square of what stays
CONSTANT = 1e-10  # of the mean square: a variance below it is rounding, and tells nothing of others
Fold = Callable[[Tensor], Tensor]


class Merged(Source):
    """A source some of whose weights are folded when they are read."""

    def __init__(self, source: Source, bonds: Bonds, kept: Kept, found: Calibration | None):
        self.__dict__ |= source.__dict__
        self.source, self.bonds, self.kept, self.found = source, bonds, kept, found
        self.folds: dict[tuple[str, int | None], list[Fold]] = {}
        self.eps = self._eps() if found else {}
        self._mix = lru_cache(maxsize=1)(self._solved)  # queries, keys and values read one place
        on_data = (*self._merged(), *self._shifts()) if found else ()
        for key, fold in (
            *on_data,
            *self._pooled(),
            *self._routed(),
        ):  # means at last, of what biases became too
            self.folds.setdefault(key, []).append(fold)

    def raw(self, weight: str, layer: int | None) -> Tensor:
        own = self.kept.made_of(weight, layer)
        x = super().raw(own, layer)
        for fold in self.folds.get((own, layer), ()):
            x = fold(exact(x))
        return x

    def where(self, weight: str, layer: int | None) -> str:
        return super().where(self.kept.made_of(weight, layer), layer)

    def _routed(self) -> Iterator[tuple[tuple[str, int | None], Fold]]:
        """A router's rows: those of experts that stay come first."""
        for layer, ops in self.bonds.ops():
            for op in ops:
                if isinstance(op, Linear) and self.bonds.mixture(op) and layer in self.kept.experts:
                    yield (f"{op.name}.weight", layer), partial(_first, self.kept.experts[layer])

    def _pooled(self) -> Iterator[tuple[tuple[str, int | None], Fold]]:
        for layer, ops in self.bonds.ops():
            for weight in (weight for op in ops for weight in op.weights()):
                wire = weight.wires[0]
                pools = self.kept.pools.get(self.bonds.place(wire, layer))
                if pools:
                    width = self.bonds.model.wires[wire].width
                    yield (weight.name, layer), partial(_averaged, pools, width)

    def _merged(self) -> Iterator[tuple[tuple[str, int | None], Fold]]:
        for site in self._sites():
            if isinstance(site.op, Norm):
                ratio = self._ratio(site)
                if ratio is not None:
                    yield (f"{site.op.name}.weight", site.layer), partial(torch.mul, other=ratio**0.5)
            for op in site.readers:
                if isinstance(op, Tied):
                    yield from self._tied(site, op)
                    continue
                yield (f"{op.name}.weight", site.layer), partial(self._fold, site, op.bias)
                if op.bias:
                    yield (f"{op.name}.bias", site.layer), partial(self._shift, site, op)

    def _sites(self) -> Iterator[Site]:
        """Those of layers that stay where a wire shrinks and that were seen."""
        for site in self.bonds.sites:
            layers = (
                self.kept.layers[self.bonds.model.stack_of(site.op.name)[0]] if site.layer is not None else ()
            )
            stays = site.layer is None or site.layer in layers
            if stays and site in self.found and self._index(site) is not None:
                yield site

    def _index(self, site: Site) -> Index | None:
        return self.kept.units.get(self.bonds.place(site.wire, site.layer))

    def _entries(self, site: Site) -> tuple[Tensor, Tensor]:
        """Those that stay, and the others."""
        wire = self.bonds.model.wires[site.wire]
        stays = torch.zeros(wire.units, dtype=torch.bool)
        stays[list(self._index(site))] = True
        stays = stays.repeat_interleave(wire.width)
        return stays.nonzero()[:, 0], (~stays).nonzero()[:, 0]

    def _solved(self, site: Site, centred: bool) -> Tensor:
        """M [r, k]."""
        moments = self.found.moments(site)
        if centred:
            mean = self.found.mean(site)
            steady = moments.diagonal() - mean.square() <= CONSTANT * moments.diagonal()
            moments = (moments - mean[:, None] * mean).masked_fill_(steady[:, None] | steady, 0.0)
        k, r = self._entries(site)
        return regression(moments[k][:, k], moments[r][:, k])

    def _fold(self, site: Site, centred: bool, x: Tensor) -> Tensor:
        (k, r), mix = self._entries(site), self._mix(site, centred)
        x = x.clone()
        x[:, k] += (x[:, r].double() @ mix).to(x.dtype)
        return x

    def _shift(self, site: Site, op: Linear, x: Tensor) -> Tensor:
        (k, r), mean = self._entries(site), self.found.mean(site)
        left = mean[r] - self._mix(site, True) @ mean[k]
        weight = self.source.read(f"{op.name}.weight", site.layer)
        return x + (weight[:, r].double() @ left).to(x.dtype)

    def _tied(self, site: Site, op: Tied) -> Iterator[tuple[tuple[str, int | None], Fold]]:
        norm = next((x for x in self.bonds.model.ops if isinstance(x, Norm) and x.writes == op.reads), None)
        if norm is None or not norm.gain:
            return
        k, _ = self._entries(site)
        factors = torch.ones(self.bonds.model.wires[site.wire].size, dtype=torch.float64)
        table = self.source.read(f"{op.table}.weight", None).double()
        factors[k] = tied_factors(table.T @ table, self.found.moments(site), k)
        for weight in norm.weights():
            yield (weight.name, None), partial(torch.mul, other=factors)

    def _ratio(self, site: Site) -> float | None:
        """v_k / v of what a norm reads, or where that is gated, of what it gives without its gain; None where
        neither can be had."""
        if not self.found.alone(site):
            return self._given(site)
        moments = self.found.moments(site)
        k, _ = self._entries(site)
        layer = site.op.kind == "layer"
        some, whole = _spread(moments[k][:, k], layer), _spread(moments, layer)
        return some / whole if some > 0 and whole > 0 else None

    def _given(self, site: Site) -> float | None:
        given = [
            x for x in self.bonds.sites if (x.wire, x.layer) == (site.op.writes, site.layer) and x.readers
        ]
        if site.op.kind != "rms" or not given or given[0] not in self.found:
            return None
        gain = self.source.read(f"{site.op.name}.weight", site.layer).double()
        square = self.found.square(given[0]) / gain.square()
        ratio = (square[self._entries(site)[0]].mean() / square.mean()).item()
        return ratio if 0 < ratio < math.inf else None

    def _eps(self) -> dict[str, float]:
        """Of each field, e, where all norms that stand for themselves and share it shrink."""
        model = self.bonds.model
        steady = [norm for norm in model.norms if not scalable(model, norm.reads)]
        found: dict[str, dict[str, list[float]]] = {}
        for site in self._sites():
            if site.op in steady and (ratio := self._ratio(site)) is not None:
                found.setdefault(site.op.eps, {}).setdefault(site.op.name, []).append(ratio)
        means = {
            field: sum(map(sum, ratios.values())) / sum(map(len, ratios.values()))
            for field, ratios in found.items()
            if ratios.keys() >= {norm.name for norm in steady if norm.eps == field}
        }
        return {field: mean for field, mean in means.items() if not math.isclose(mean, 1.0, rel_tol=1e-6)}

    def _shifts(self) -> Iterator[tuple[tuple[str, int | None], Fold]]:
        """Of what writes for the other norms that share an eps."""
        model, sites = self.bonds.model, {(site.op.name, site.layer): site for site in self._sites()}
        for layer, ops in self.bonds.ops():
            for norm in ops if layer is not None else ():
                if not (isinstance(norm, Norm) and norm.eps in self.eps and scalable(model, norm.reads)):
                    continue
                site = sites.get((norm.name, layer)) if norm.per == "wire" else None
                shift = math.sqrt(self.eps[norm.eps] / ((site and self._ratio(site)) or 1.0))
                wires = written_for(model, norm.reads)
                for op in ops:
                    if isinstance(op, Linear) and op.writes in wires:
                        for weight in op.weights():
                            yield (weight.name, layer), partial(torch.mul, other=shift)


def regression(within: Tensor, across: Tensor) -> Tensor:
    """M [r, k] of C_kk [k, k] and C_rk [r, k]."""
    own = within.diagonal()
    told = across.abs() / own.clamp(min=torch.finfo(own.dtype).tiny).sqrt()
    best = told.argmax(1)
    rows = torch.arange(len(across))
    prior = torch.zeros_like(across)
    prior[rows, best] = torch.where(own[best] > 0, across[rows, best] / own[best], 0.0)
    lifted = within + RIDGE * own.mean() * torch.eye(len(within), dtype=within.dtype)
    if not own.mean() > 0:
        return prior
    return prior + torch.linalg.solve(lifted, (across - prior @ within).T).T


def tied_factors(table: Tensor, moments: Tensor, kept: Tensor) -> Tensor:
    """a [k] of T^T T [S, S] and C [S, S]."""
    both = table * moments
    own, wanted = both[kept][:, kept], both[kept].sum(1)
    removed = torch.ones(len(both), dtype=torch.bool)
    removed[kept] = False
    prior = _counted(both, kept, removed.nonzero()[:, 0])
    lifted = own + RIDGE * own.diagonal().mean() * torch.eye(len(own), dtype=own.dtype)
    return prior + torch.linalg.solve(lifted, wanted - own @ prior)


def _counted(both: Tensor, kept: Tensor, removed: Tensor) -> Tensor:
    """One for each that stays, and what it tells of those removed of which it tells most."""
    prior = torch.ones(len(kept), dtype=both.dtype)
    if not len(removed):
        return prior
    own = both.diagonal()[kept].clamp(min=torch.finfo(both.dtype).tiny)
    share = both[removed][:, kept] / own
    best = (share * own.sqrt()).abs().argmax(1)
    return prior.index_add(0, best, share[torch.arange(len(removed)), best])


def _first(index: Index, x: Tensor) -> Tensor:
    return torch.cat([x[list(index)], x.new_zeros(len(x) - len(index), *x.shape[1:])])


def _averaged(pools: tuple[Index, ...], width: int, x: Tensor) -> Tensor:
    """The mean of each pool's units along axis 0, in the place of each of them."""
    units = x.unflatten(0, (-1, width)).clone()
    for pool in pools:
        units[list(pool)] = units[list(pool)].mean(0)
    return units.flatten(0, 1)


def _spread(moments: Tensor, centred: bool) -> float:
    """The mean over channels of E[x^2], less that of the mean over channels."""
    S = len(moments)
    return (moments.trace() / S - (moments.sum() / S**2 if centred else 0.0)).item()
