"""What a config asks the hardware to do: parameters per rank, models held, passes per step, tokens and FLOPs."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_rlvr.architecture import Architecture
from megatron_rlvr.config import Config
from megatron_rlvr.planner.shapes import find_architecture


def layer_parameters(architecture: Architecture, tp: int) -> int:
    """One tensor-parallel rank's part of a layer: attention, gated MLP, norms."""
    h, q, kv, ffn = architecture.hidden_size, architecture.query_size, architecture.kv_size, architecture.ffn_size
    matrices = ((q + 2 * kv) * h + q * h + 3 * ffn * h) // tp
    bias = (q + 2 * kv) // tp if architecture.qkv_bias else 0
    return matrices + bias + 2 * h + (2 * architecture.head_dim if architecture.qk_norm else 0)


def stage_parameters(architecture: Architecture, tp: int, pp: int, stage: int, heads: int = 0) -> int:
    """Of one rank of pipeline stage ``stage``; ``heads``: a critic's, which take the place of the output layer.

    A tied model's last stage has a copy of the embedding, where that is not the first one too.
    """
    h, first, last = architecture.hidden_size, stage == 0, stage == pp - 1
    vocabulary = architecture.padded_vocab(tp) // tp * h
    total = architecture.num_layers // pp * layer_parameters(architecture, tp) + first * vocabulary
    if last:
        has_output = not heads and not (architecture.tied and first)
        total += h + has_output * vocabulary + heads * (h + 1)
    return total


def whole_parameters(architecture: Architecture, output: bool = True) -> int:
    """Of the model as its folder holds it: no padding, a tied embedding once; ``output``: with the output layer."""
    h, vocabulary = architecture.hidden_size, architecture.vocab_size * architecture.hidden_size
    ends = vocabulary if architecture.tied or not output else 2 * vocabulary
    return architecture.num_layers * layer_parameters(architecture, 1) + h + ends


def forward_flops(architecture: Architecture, tokens: float, context: float, output: bool = True) -> float:
    """Of ``tokens`` tokens that see ``context`` tokens each on average; ``output``: with the output layer.

    Two FLOPs per weight of a matrix and token, and per layer 4 q context for the attention's two products (arXiv
    2104.04473, appendix; causal attention computes the lower half, which ``context`` accounts for).
    """
    h, q, kv, ffn = architecture.hidden_size, architecture.query_size, architecture.kv_size, architecture.ffn_size
    weights = architecture.num_layers * ((2 * q + 2 * kv) * h + 3 * ffn * h)
    weights += output * architecture.vocab_size * h
    return tokens * (2 * weights + 4 * architecture.num_layers * q * context)


# Methods that read the old policy's statistics before the loss whatever the number of updates (exploration/*.needs,
# which import torch; a test holds the two together): option -> value for which they do.
_OLD_STATISTICS = {
    "stapo": ("", ""),
    "high_entropy": ("scope", "update"),
    "kl_cov": ("scope", "update"),
    "clip_cov": ("scope", "update"),
}


@dataclass(frozen=True)
class Workload:
    """Models and passes of a step. ``old_top``: most probable tokens kept per token of the batch (Lp-Reg's proxy)."""

    policy: Architecture
    source: str
    critic: Architecture | None = None  # untied: its output layer is its heads
    reference: bool = False
    old_policy_pass: bool = False
    states_pass: bool = False  # hidden states of the old policy, without logits
    old_top: int = 0

    @staticmethod
    def of(config: Config) -> Workload:
        """Raises ConfigError: a model whose shape is neither in a folder nor known."""
        policy, source = find_architecture(config, config.model.path, "model.path")
        critic = None
        if config.has_critic:
            own = config.critic.path
            critic = find_architecture(config, own, "critic.path")[0] if own else policy
            critic = replace(critic, tied=False)
        lp_reg = config.exploration.get("lp_reg")
        lp_reg = None if lp_reg is None else {"preset": "paper"} | {k: v for k, v in lp_reg.items() if v is not None}
        return Workload(
            policy,
            source,
            critic,
            reference=config.algorithm.kl.coefficient > 0 or bool(lp_reg and lp_reg.get("proxy_source") == "reference"),
            old_policy_pass=_has_old_policy_pass(config, lp_reg),
            states_pass="sim_hash" in config.exploration,
            old_top=_old_top(config, lp_reg),
        )


def _has_old_policy_pass(config: Config, lp_reg: dict | None) -> bool:
    for name, (option, value) in _OLD_STATISTICS.items():
        options = config.exploration.get(name)
        if options is not None and (not option or options.get(option, value) == value):
            return True
    source = lp_reg.get("proxy_source", "old") if lp_reg else ""
    if lp_reg and (source == "reference" or (lp_reg.get("target_share", 0) and source != "rollout")):
        return True
    if config.exploration.get("rollout_correction", {}).get("renormalise"):
        return True
    return config.learns_from_older


def _old_top(config: Config, lp_reg: dict | None) -> int:
    if not lp_reg or not config.learns_from_older or lp_reg.get("proxy_source", "old") != "old":
        return 0
    divergence = {"paper": "fwd_kl_full"}.get(lp_reg["preset"], "k3_sampled")
    return lp_reg.get("proxy_size", 128) if lp_reg.get("divergence", divergence) == "fwd_kl_full" else 0
