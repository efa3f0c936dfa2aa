"""Lp-Reg: keep the improbable tokens that the policy itself finds reasonable (arXiv 2510.03222v2 Sec 4, Eq 5-6).

    proxy q:      p restricted to the tokens with p >= kappa * max p (or p >= tau), divided by the kept mass Z
    regularised:  p(o) among the lowest rho of the update,  A < 0  and  q(o) > 0
    loss there:   L_t = surrogate_t + beta * D(q, p)

The old policy's forward pass gives ln p(o), ln Z and ln q(o) at once, so the proxy costs no pass of its own. With one
update per rollout there is no such pass: the training forward's policy is the old one, and D = -ln Z. With several, the
old pass also keeps the proxy's ``proxy_size`` most probable tokens, always with o, and D is the exact KL of those,
renormalised, to the current policy. How often the proxy has more tokens than that is ``lp_reg/cut_share``.
``proxy_source: rollout`` takes the engine's own distribution instead, by its ``proxy_size`` most probable tokens.

``preset: paper`` is Eq 6; ``preset: released_code`` is what github.com/CarlanLark/Lp-Reg-dev @33b27e2 runs
(verl/trainer/ppo/core_algos.py:648-745). An option that is given explicitly wins over the preset. The rest of the
recipe belongs to the algorithm and is set there:

    paper           algorithm: {loss: plain_clip, clip_low: 1.0, clip_high: 9.0, reduction: token_mean}
    released_code   algorithm: {loss: ppo, clip_low: 1.0, clip_high: 9.0, reduction: microbatch_token_mean}
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_rlvr import losses as policy_losses
from megatron_rlvr.config import Config as RunConfig
from megatron_rlvr.config import rule
from megatron_rlvr.distributed import reduce
from megatron_rlvr.distributed.groups import ParallelGroups
from megatron_rlvr.distributed.vocab import TokenStatistics
from megatron_rlvr.exploration.base import Exploration, Needs, Threshold
from megatron_rlvr.metrics import Meter
from megatron_rlvr.types import Batch, Microbatch, Update

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "threshold_temperature": 0.0,
        "proxy_source": "old",
        "percentile_pool": "all_tokens",
        "percentile_scope": "update",
        "min_two": False,
        "gate": "kept",
        "divergence": "fwd_kl_full",
        "k3_clamp": 0.0,
        "replace_clipped": False,
    },
    "released_code": {
        "threshold_temperature": 1.0,
        "proxy_source": "old",
        "percentile_pool": "neg_tokens",
        "percentile_scope": "microbatch",
        "min_two": True,
        "gate": "below_proxy",
        "divergence": "k3_sampled",
        "k3_clamp": 10.0,
        "replace_clipped": True,
    },
}

EVERYTHING = 1e-6  # -ln of a mass that is 1 but for the rounding of its log-probs


@dataclass
class Config:
    """None stands for what the preset says."""

    preset: Literal["paper", "released_code"] = "paper"
    rho: float = 0.01  # share of the tokens that are improbable enough; the paper takes 0.01 (14B) and 0.005 (32B)
    pos_rho: float = 0.0  # the same for tokens with A > 0; 0: only A < 0 is regularised
    # Share of the update's tokens to regularise, whatever the policy has become, instead of the hand-tuned rho; 0: off.
    # The paper's fixed rho regularised fewer and fewer tokens, as those that pass the filter went from 27% to 8%.
    target_share: float = 0.0
    beta: float | Literal["advantage"] = 1.0  # weight of the divergence; advantage: protection * |A| at each token
    # With beta=advantage; on-policy, with k3, the net coefficient is then |A| (1 - protection (1/Z - 1)).
    protection: float = 1.0
    kappa: float | None = None  # min-p threshold, kept where p >= kappa * max p; 0.02 unless tau is given
    tau: float | None = None  # fixed threshold instead, kept where p >= tau
    threshold_temperature: float | None = None  # of the distribution that is thresholded; 0: the sampling temperature
    # The policy that the proxy is a part of; rollout: the old one as the engine computes it.
    proxy_source: Literal["old", "current", "rollout", "reference"] | None = None
    percentile_pool: Literal["all_tokens", "neg_tokens"] | None = None  # neg_tokens: A < 0 (A > 0 for pos_rho)
    percentile_scope: Literal["update", "microbatch"] | None = None  # update: over every rank, by old log-probs
    min_two: bool | None = None  # take floor(rho * n) tokens, none if that is fewer than two; else ceil(rho * n)
    gate: Literal["kept", "below_proxy"] | None = None  # q(o) > 0; below_proxy: also p(o) < q(o)
    divergence: Literal["fwd_kl_full", "k3_sampled", "k2_sampled"] | None = None  # full: over the vocabulary
    # Tokens of an old proxy that fwd_kl_full reads, 12 bytes each per token of the batch; or that the engine returns.
    proxy_size: int = 128
    k3_clamp: float | None = None  # k3 is cut off here, and with it its gradient; 0: no bound
    replace_clipped: bool | None = None  # regularised tokens keep -A r instead of the clipped surrogate

    def __post_init__(self) -> None:
        preset = PRESETS[self.preset]
        self.divergence = self.divergence or preset["divergence"]
        bound = preset["k3_clamp"] if self.divergence == "k3_sampled" else 0.0
        for option, value in (preset | {"k3_clamp": bound}).items():
            if getattr(self, option) is None:
                setattr(self, option, value)
        self._check()
        if self.kappa is None and self.tau is None:
            self.kappa = 0.02

    def _check(self) -> None:
        name, share = "exploration.lp_reg", "it is a share of the tokens"
        rule(0 < self.rho < 1, f"{name}.rho must be in (0, 1), not {self.rho}: {share}")
        rule(0 <= self.pos_rho < 1, f"{name}.pos_rho must be in [0, 1), not {self.pos_rho}: {share}")
        rule(0 <= self.target_share < 1, f"{name}.target_share must be in [0, 1), not {self.target_share}: {share}")
        rule(
            not self.target_share or self.proxy_source != "current",
            f"{name}.target_share picks tokens before the update, when a proxy of the current policy is not yet known: "
            f"set {name}.proxy_source=old",
        )
        rule(
            self.proxy_source not in ("reference", "rollout") or self.divergence != "fwd_kl_full",
            f"{name}.proxy_source={self.proxy_source} keeps only scalars of that proxy: set "
            f"{name}.divergence=k3_sampled, which has the gradient of the full KL in expectation",
        )
        for option in ("beta", "protection"):
            value = getattr(self, option)
            rule(
                value == "advantage" or value >= 0,
                f"{name}.{option} must be at least 0, not {value}: below 0 it would drive p away from q",
            )
        rule(
            self.beta == "advantage" or self.protection == 1.0,
            f"{name}.protection={self.protection} is read with {name}.beta=advantage alone, and beta={self.beta}",
        )
        rule(
            self.kappa is None or self.tau is None,
            f"{name}.kappa={self.kappa} and {name}.tau={self.tau} are two thresholds for one proxy: give one of them",
        )
        rule(
            self.kappa is None or 0 < self.kappa <= 1,
            f"{name}.kappa must be in (0, 1], not {self.kappa}: it is a share of the largest probability",
        )
        rule(self.tau is None or 0 < self.tau < 1, f"{name}.tau must be in (0, 1), not {self.tau}: it is a probability")
        rule(self.proxy_size >= 1, f"{name}.proxy_size must be at least 1, not {self.proxy_size}: a proxy has tokens")
        for option in ("threshold_temperature", "k3_clamp"):
            value = getattr(self, option)
            rule(value >= 0, f"{name}.{option} must be above 0 (or 0, see its comment), not {value}")
        rule(
            not self.k3_clamp or self.divergence == "k3_sampled",
            f"{name}.k3_clamp={self.k3_clamp} bounds {name}.divergence=k3_sampled alone, and that is {self.divergence}",
        )


def fwd_kl_full(current: TokenStatistics, target: Tensor, clamp: float) -> tuple[Tensor, Tensor]:
    """KL(q || p) over the vocabulary, with gradient p - q in the logits; -ln Z where q is part of p itself."""
    divergence = -current.log_kept_mass if current.old_kl is None else current.old_kl
    return divergence, current.log_prob.exp() - target.exp()


def k3_sampled(current: TokenStatistics, target: Tensor, clamp: float) -> tuple[Tensor, Tensor]:
    """e^x - x - 1 with x = ln q(o) - ln p(o): in expectation over o the gradient of KL(q || p)."""
    divergence = policy_losses.k3(current.log_prob, target)
    slope = 1 - policy_losses.ratio(target, current.log_prob)
    if not clamp:
        return divergence, slope
    return divergence.clamp(max=clamp), torch.where(divergence <= clamp, slope, 0.0)


def k2_sampled(current: TokenStatistics, target: Tensor, clamp: float) -> tuple[Tensor, Tensor]:
    """x^2 / 2 with x = ln q(o) - ln p(o)."""
    return policy_losses.k2(current.log_prob, target), policy_losses.log_ratio(current.log_prob, target)


# Each: current statistics, ln q(o) and the bound of k3 -> the divergence [t] with its gradient, and its slope [t] in
# the sampled token's log-prob (fwd_kl_full: in its logit), for the metrics.
DIVERGENCES: dict[str, Callable[[TokenStatistics, Tensor, float], tuple[Tensor, Tensor]]] = {
    "fwd_kl_full": fwd_kl_full,
    "k3_sampled": k3_sampled,
    "k2_sampled": k2_sampled,
}


class LpReg(Exploration):
    order = 20
    config: Config

    def __init__(self, name: str, config: Config, run: RunConfig | None = None) -> None:
        super().__init__(name, config, run)
        self.excludes = "replaces_losses" if config.replace_clipped else ""
        self._limits: dict[int, Tensor] = {}  # sign of A -> highest ln p(o) that is improbable, of this update
        self._ranked_by = "old_log_probs"  # what the limits of an update were taken over
        # Else the proxy of the old policy is that of the current one, whose KL needs no list of tokens.
        of_older = config.proxy_source == "old" and self.run.learns_from_older
        self.old_top = config.proxy_size if of_older and config.divergence == "fwd_kl_full" else 0
        sampled_at, thresholded_at = self.run.rollout.temperature, config.threshold_temperature
        self.sharpness = sampled_at / (thresholded_at or sampled_at)  # of the thresholded distribution
        rule(
            config.proxy_source != "rollout" or config.tau is None or self.sharpness == 1,
            f"exploration.lp_reg.proxy_source=rollout knows probabilities at rollout.temperature={sampled_at} alone, "
            f"and tau is one at threshold_temperature={thresholded_at}: set that to 0, or kappa instead of tau",
        )

    def needs(self) -> Needs:
        config, of_engine = self.config, self.config.proxy_source == "rollout"
        return Needs(
            old_statistics=(config.target_share > 0 and not of_engine) or config.proxy_source == "reference",
            reference=config.proxy_source == "reference",
            threshold=None if of_engine else Threshold(config.kappa, config.tau, config.threshold_temperature or 0.0),
            old_top=self.old_top,
            rollout_top=config.proxy_size if of_engine else 0,
        )

    def annotate_sample(self, log_probs: list[float], top_log_probs: list[list[float]]) -> dict[str, list[float]]:
        """The engine's proxy, of the tokens that it returns; cut: all of them are kept, and there are others."""
        width = max(map(len, top_log_probs))
        rows = [row + [-math.inf] * (width - len(row)) for row in top_log_probs]
        top, sampled = torch.tensor(rows, dtype=torch.float64), torch.tensor(log_probs, dtype=torch.float64)
        config = self.config
        if config.tau is None:
            least = top[:, 0] + math.log(config.kappa or 0.0) / self.sharpness
        else:
            least = torch.full_like(sampled, math.log(config.tau))
        is_kept = top >= least[:, None]
        log_mass = torch.where(is_kept, top, -torch.inf).logsumexp(1).clamp(max=0.0)
        log_mass = torch.where(is_kept.any(1), log_mass, 0.0)
        is_cut = (is_kept | top.isinf()).all(1) & (log_mass < -EVERYTHING)
        return {
            "lp_reg/proxy_log_prob": torch.where(sampled >= least, sampled - log_mass, -torch.inf).tolist(),
            "lp_reg/log_kept_mass": log_mass.tolist(),
            "lp_reg/cut": is_cut.double().tolist(),
        }

    def annotate(
        self, batch: Batch, old: TokenStatistics, reference: TokenStatistics | None = None
    ) -> dict[str, Tensor]:
        if self.config.proxy_source in ("current", "rollout"):
            return {}
        source = old if self.config.proxy_source == "old" else reference
        assert source is not None
        kept = {"lp_reg/proxy_log_prob": source.proxy_log_prob, "lp_reg/log_kept_mass": source.log_kept_mass}
        return kept | ({"lp_reg/cut": source.top_cut} if source.top_cut is not None else {})

    def prepare_update(self, batch: Batch, update: Update, groups: ParallelGroups) -> None:
        if self.config.percentile_scope == "update":
            whole = batch.of_update(update)
            self._ranked_by = "old_log_probs" if batch.has("old_log_probs") else "rollout_log_probs"
            self._limits = self._percentiles(whole, getattr(whole, self._ranked_by), groups)

    def policy_loss(self, losses: Tensor, micro: Microbatch, current: TokenStatistics, meter: Meter) -> Tensor:
        log_prob = current.log_prob.detach()
        proxy, log_kept_mass = self._proxy(micro, current)
        candidates = self._candidates(micro, log_prob)
        kept = candidates & proxy.isfinite()  # a filtered token has ln q(o) = -inf
        selected = kept & (log_prob < proxy) if self.config.gate == "below_proxy" else kept

        target = torch.where(selected, proxy, log_prob)
        divergence, slope = DIVERGENCES[str(self.config.divergence)](current, target, self.config.k3_clamp or 0.0)
        unclipped = -micro.advantages * policy_losses.ratio(current.log_prob, micro.old_log_probs)

        micro.extras["lp_reg/selected"] = selected
        beta = self._beta(micro)
        if self.config.replace_clipped:
            losses = torch.where(selected, unclipped, losses)
        net = _slope(losses, current.log_prob) + beta * slope
        self._record(micro, candidates, kept, selected, meter)
        for name, value in {"kept_mass": log_kept_mass.exp(), "divergence": divergence, "net_coefficient": net}.items():
            meter.add(f"lp_reg/{name}", torch.where(selected, value, 0.0).sum(), selected.sum())
        if "lp_reg/cut" in micro.extras:
            meter.add("lp_reg/cut_share", (selected & micro.extras["lp_reg/cut"].bool()).sum(), selected.sum())
        return losses + beta * torch.where(selected, divergence, 0.0)

    def _beta(self, micro: Microbatch) -> Tensor | float:
        if self.config.beta == "advantage":
            return self.config.protection * micro.advantages.abs()
        return self.config.beta

    def _proxy(self, micro: Microbatch, current: TokenStatistics) -> tuple[Tensor, Tensor]:
        """ln q(o), -inf where o is filtered, and ln Z; both without gradient.

        Where the old policy had no pass of its own, the current one still equals it.
        """
        if self.config.proxy_source == "current" or "lp_reg/proxy_log_prob" not in micro.extras:
            return current.proxy_log_prob.detach(), current.log_kept_mass.detach()
        return micro.extras["lp_reg/proxy_log_prob"], micro.extras["lp_reg/log_kept_mass"]

    def _sides(self) -> list[tuple[int, float]]:
        """(sign of A, rho) of the tokens that may be regularised; A = 0 never is."""
        return [(-1, self.config.rho)] + ([(1, self.config.pos_rho)] if self.config.pos_rho else [])

    def _candidates(self, micro: Microbatch, log_prob: Tensor) -> Tensor:
        """[t] improbable tokens on a regularised side.

        Old log-probs are held against the update's percentile, current ones against the microbatch's: each against the
        distribution that the percentile was taken over.
        """
        ranked = log_prob
        if self.config.percentile_scope == "microbatch":
            self._limits = self._percentiles(micro, log_prob, ParallelGroups.single())
        else:
            ranked = getattr(micro, self._ranked_by)
        candidates = torch.zeros_like(micro.loss_mask)
        for sign, _ in self._sides():
            candidates |= micro.loss_mask & (micro.advantages * sign > 0) & (ranked <= self._limits[sign])
        return candidates

    def _percentiles(self, tokens: Microbatch, log_probs: Tensor, groups: ParallelGroups) -> dict[int, Tensor]:
        """Side -> the k-th lowest log-prob of the pool over the data-parallel ranks; -inf: nothing is regularised."""
        limits = {}
        for sign, rho in self._sides():
            side = tokens.loss_mask & (tokens.advantages * sign > 0)
            pool = side if self.config.percentile_pool == "neg_tokens" else tokens.loss_mask
            if aims := sign < 0 and self.config.target_share > 0:
                pool = side & tokens.extras["lp_reg/proxy_log_prob"].isfinite()
            total, count = reduce.all_sum(torch.stack([tokens.loss_mask.sum(), pool.sum()]), groups.dp).tolist()
            if aims:
                k = min(round(self.config.target_share * total), count)
            else:
                k = int(rho * count) if self.config.min_two else math.ceil(round(rho * count, 6))
            if self.config.min_two and k < 2:
                k = 0
            limits[sign] = reduce.kth_smallest(log_probs, pool, k, groups.dp)
        return limits

    def _record(self, micro: Microbatch, candidates: Tensor, kept: Tensor, selected: Tensor, meter: Meter) -> None:
        """Shares of loss tokens, the candidates that survive the filter, and delta, the improbable side's upper end."""
        count, limit = micro.loss_mask.sum(), self._limits[-1]
        meter.add("lp_reg/share", selected.sum(), count)
        meter.add("lp_reg/candidates", candidates.sum(), count)
        meter.add("lp_reg/survive_share", kept.sum(), candidates.sum())
        meter.add("lp_reg/delta", limit.exp() * count, limit.isfinite() * count)


def _slope(losses: Tensor, log_prob: Tensor) -> Tensor:
    """[t] of each loss in its token's log-prob: 0 where a clip holds, whatever the loss and the methods before."""
    (slope,) = torch.autograd.grad(losses.sum(), log_prob, retain_graph=True, allow_unused=True, materialize_grads=True)
    return slope
