"""The configuration: dataclasses read from YAML, changed by dotted overrides, checked before anything starts.

    config = load_config("examples/countdown_cpu/config.yaml", ["parallel.tp=2", "exploration.lp_reg.rho=0.05"])

This file is the list of keys. Every mistake is a ConfigError that names the key, the rule, the value and the way out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from megatron_rlvr.config_reading import ConfigError, apply_override, from_dict, read_tree, rule
from megatron_rlvr.config_rules import batch_table, check

__all__ = [
    "Config",
    "ConfigError",
    "as_yaml",
    "batch_table",
    "check",
    "dump",
    "flat",
    "from_dict",
    "load_config",
    "rule",
    "to_dict",
]


@dataclass
class ModelConfig:
    path: str = ""  # a Hugging Face folder (config.json, tokenizer, safetensors), or a Megatron one of convert_hf.py
    random_init: bool = False  # take the shape from config.json and draw the weights from `seed`
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    recompute: Literal["none", "selective", "full"] = "none"  # activations recomputed in the backward pass
    # fused: a few rows of logits at a time, made again in the backward.
    # fused_float32: and of a bfloat16 model they stay the float32 sums of its products. bfloat16 knows a logit near 25
    # to 0.06, so after a small update ratios, clips and gates of the next are rounding; on-policy it matters little.
    # auto: fused_float32 for a bfloat16 model with several updates per rollout, else fused where all take over 1 GiB.
    logits: Literal["auto", "materialised", "fused", "fused_float32"] = "auto"
    dropout: float = 0.0  # of attention weights and layer outputs, in updates alone

    @property
    def itemsize(self) -> int:
        """Bytes of a number in ``dtype``."""
        return 4 if self.dtype == "float32" else 2


@dataclass
class ParallelConfig:
    tp: int = 1  # tensor-parallel ranks
    pp: int = 1  # pipeline stages
    vpp: int = 1  # virtual stages (model chunks) per pipeline stage
    cp: int = 1  # context-parallel ranks, each with a part of the tokens of every microbatch
    dp: int = 1  # data-parallel replicas; tp * cp * pp * dp ranks in all
    sequence_parallel: bool = False  # shard norms and dropout over the tensor-parallel ranks


@dataclass
class SourceConfig:
    """One part of a mixture: `sources: [{path: a.parquet}, {path: b.jsonl, weight: 0.5}]`."""

    path: str = ""
    weight: float = 1.0  # how often each of its prompts comes per epoch; 0.5: every second epoch
    prompt_field: str = ""  # empty: that of the section, else detected
    answer_field: str = ""


@dataclass
class DataConfig:
    # .jsonl, .jsonl.gz, .json, .parquet, a folder that datasets wrote, or hub:OWNER/NAME[/SUBSET][@SPLIT]
    path: str = ""
    sources: list[SourceConfig] = field(default_factory=list)  # instead of `path`: several
    eval_path: str = ""  # held-out prompts; empty: no evaluation
    eval_sources: list[SourceConfig] = field(default_factory=list)  # instead of `eval_path`: several, each with figures
    prompt_field: str = ""  # empty: detected from the first row
    answer_field: str = ""
    # chat: the tokenizer's own; boxed, dapo: Qwen's and DAPO's request for an answer inside that; r1_zero:
    # DeepSeek-R1-Zero's for base models; raw: the prompt's text as it is
    template: Literal["chat", "boxed", "dapo", "r1_zero", "raw"] = "chat"
    # drop: each prompt once, and none whose rows contradict each other; keep: every row, contradictions too
    repeats: Literal["drop", "keep"] = "drop"
    max_prompt_length: int = 1024  # tokens
    strict: bool = False  # stop at the first row that cannot be used, instead of counting and dropping it
    shuffle: bool = True  # anew in every epoch, by `seed`; false: in the order of sources and rows

    @property
    def train_sources(self) -> list[SourceConfig]:
        return self.sources or [SourceConfig(self.path)]

    @property
    def held_out_sources(self) -> list[SourceConfig]:
        return self.eval_sources or ([SourceConfig(self.eval_path)] if self.eval_path else [])


@dataclass
class RewardConfig:
    scale: Literal["verifier", "signed"] = "verifier"  # signed: 0..1 mapped to -1..+1
    workers: int = 2  # verifier processes per scoring rank
    deadline: float = 10.0  # seconds of CPU time per answer; six times as much wall time ends it too
    max_error_share: float = 0.1  # of a step's verdicts; above it the run stops


@dataclass
class RolloutConfig:
    prompts_per_step: int = 32  # each with a group of responses
    responses_per_prompt: int = 8  # of a group, which are compared with each other
    max_response_length: int = 1024  # tokens
    temperature: float = 1.0  # of sampling; the policy's log-probs are taken at it too
    tp: int = 0  # tensor-parallel ranks of the engine; 0: as many as the policy's
    kv_cache_mib: int = 256  # on the CPU; a GPU takes `gpu_memory_utilization`
    gpu_memory_utilization: float = 0.5  # the engine's share of the whole GPU; it sleeps while the policy trains
    max_running: int = 256  # sequences that the engine decodes together


@dataclass
class KlConfig:
    """Distance from the frozen model that the run starts from; that model is only built where it is needed."""

    coefficient: float = 0.0  # loss, or reward, per nat of KL(policy || reference)
    # From the sampled token: k1 is the log-ratio, k2 half its square, k3 never negative with k1's mean. In the loss, k1
    # has no gradient on average, k2 has that of KL(policy || reference), k3 that of KL(reference || policy).
    estimator: Literal["k1", "k2", "k3"] = "k3"
    # reward: of the old policy (by the rollout's log-probs where it has no pass of its own); a token loses its own
    # (gae), its own and the later tokens' (reinforce), else its whole response's. Where a group's rewards are equal,
    # grpo divides by the spread of the KL alone, which blows that up to full size: take grpo_no_std.
    where: Literal["loss", "reward"] = "loss"
    # k3 is cut off here, and with it its gradient, as in verl and NeMo-RL; 0: no bound. It grows like e^x: of one token
    # 12 nats below the reference it is 163,000, which outweighs the rest of an update.
    k3_clamp: float = 10.0


@dataclass
class AlgorithmConfig:
    advantage: Literal["grpo", "grpo_no_std", "rloo", "reinforce", "gae"] = "grpo"  # gae: PPO, against a critic
    whiten: bool = False  # advantages of all tokens of the step to mean 0 and variance 1 (REINFORCE++); gae always does
    kl: KlConfig = field(default_factory=KlConfig)
    loss: Literal["ppo", "plain_clip", "unclipped", "gspo", "cispo", "dppo_tv", "dppo_kl"] = "ppo"
    clip_low: float = 0.2  # ratio clipped to [1 - clip_low, 1 + clip_high]; dppo: bounds on the distance from p_old
    clip_high: float = 0.2
    dual_clip: float = 0.0  # ppo: bound c > 1 on the ratio where A < 0; 0: off
    # sequence_sum divides a response's sum by rollout.max_response_length
    reduction: Literal["token_mean", "sequence_mean", "sequence_sum", "microbatch_token_mean"] = "token_mean"


@dataclass
class OptimizerConfig:
    lr: float = 1e-6  # the highest, after the warm-up
    min_lr: float = 0.0  # where linear and cosine end
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # behind the warm-up, to the run's last update
    warmup_steps: int = 0  # optimizer updates over which the rate rises from 0
    weight_decay: float = 0.0  # on matrices only
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])  # AdamW's
    eps: float = 1e-8  # AdamW's
    clip_grad: float = 1.0  # norm of all gradients together, above which they are scaled down; 0: off
    distributed: bool = True  # optimizer state sharded over the data- and context-parallel ranks


@dataclass
class CriticOptimizerConfig(OptimizerConfig):
    lr: float = 1e-5  # ten times the policy's: its head starts from nothing


@dataclass
class CriticConfig:
    """The critic of PPO: only read where algorithm.advantage is gae."""

    path: str = ""  # a Hugging Face folder whose weights it starts from; empty: the policy's
    num_heads: int = 1  # K; their mean is the value, their spread is what CDE's critic bonus rewards
    head_init: float = 0.1  # spread of the heads' first values, about: in units of reward
    share: float = 1.0  # zeta: the share of an update's data that each head learns from, drawn for each head
    share_of: Literal["responses", "tokens"] = "responses"
    gamma: float = 1.0  # discount per token
    lam: float = 1.0  # GAE's lambda
    value_clip: float = 0.5  # how far a value may move per rollout before its gradient ends; 0: no limit
    warmup_steps: int = 0  # first steps, in which only the critic learns
    optimizer: CriticOptimizerConfig = field(default_factory=CriticOptimizerConfig)


@dataclass
class TrainerConfig:
    num_steps: int = 100  # rollouts; each is followed by `updates_per_rollout` optimizer updates
    updates_per_rollout: int = 1  # 1: on-policy
    microbatch_tokens: int = 8192  # packed tokens per microbatch, prompt and response
    eval_every: int = 0  # steps; 0: only at the end
    eval_responses: int = 16  # per held-out prompt
    eval_temperature: float | None = None  # of held-out responses and their perplexities; null: rollout.temperature
    save_every: int = 0  # steps; 0: only at the end
    keep_last: int = 2  # newest checkpoints that stay: one, and the one before in case the disk damages it
    keep_best: int = 0  # checkpoints with the best eval/pass@1 that stay besides
    log_rollouts: int = 8  # responses written to rollouts.jsonl per step; 0: none


@dataclass
class RunConfig:
    dir: str = ""  # empty: runs/NAME
    # never: refuse a folder that holds a run. auto: go on from the newest whole checkpoint, or begin with step 1 where
    # there is none. must: refuse a folder without one.
    resume: Literal["never", "auto", "must"] = "never"
    accept_changes: bool = False  # resume although the config has changed in a way that makes it another run
    overwrite: bool = False  # replace an earlier run in the same folder
    port: int = 0  # where the ranks of one machine meet; 0: a free one
    # seconds that a rank may give no sign of life (a response or a verdict that is done, a microbatch, the step's next
    # phase), also while it waits for others; then every rank writes its stacks to RUN/logs/hang and the run ends
    hang_timeout: float = 1800.0

    @property
    def collective_timeout(self) -> float:
        """Seconds after which a rank that waits for its peers fails by itself: when the watchdog has had its say."""
        return self.hang_timeout + 600.0


@dataclass
class LoggingConfig:
    tensorboard: bool = True  # under RUN/tensorboard
    wandb_project: str = ""  # empty: off
    mlflow_experiment: str = ""  # empty: off; where to is MLflow's own MLFLOW_TRACKING_URI, else RUN/mlflow.db
    record_responses: int = 8  # per step, whose every token is recorded under RUN/tokens; 0: none
    progress: Literal["auto", "bar", "lines", "none"] = "auto"  # auto: a bar on a terminal, else lines


@dataclass
class Config:
    name: str = "run"  # in records and trackers; the folder is runs/NAME where run.dir is empty
    seed: int = 0  # of prompts, samples and random weights
    prepare: str = ""  # a Python script that makes `model.path` and `data.path`; run once where model.path is missing
    verifier: str = ""  # a name, a Python file of your own, or a weighted sum: 0.9*math + 0.1*format
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    exploration: dict[str, dict] = field(default_factory=dict)  # method name -> its own options
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    run: RunConfig = field(default_factory=RunConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    @property
    def run_dir(self) -> Path:
        return Path(self.run.dir or f"runs/{self.name}")

    @property
    def has_critic(self) -> bool:
        return self.algorithm.advantage == "gae"

    @property
    def critic_warmup(self) -> int:
        """First steps, in which only the critic learns."""
        return self.critic.warmup_steps if self.has_critic else 0

    @property
    def learns_from_older(self) -> bool:
        """Whether a training forward is of another policy than the one that sampled: after an update, with dropout."""
        return self.trainer.updates_per_rollout > 1 or self.model.dropout > 0

    @property
    def rollout_tp(self) -> int:
        return self.rollout.tp or self.parallel.tp

    @property
    def world_size(self) -> int:
        return self.parallel.tp * self.parallel.cp * self.parallel.pp * self.parallel.dp

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence there can be, prompt and response."""
        return self.data.max_prompt_length + self.rollout.max_response_length

    @property
    def responses_per_step(self) -> int:
        return self.rollout.prompts_per_step * self.rollout.responses_per_prompt

    @property
    def responses_per_rank(self) -> int:
        """Of an update on the data-parallel rank that has most."""
        return -(-self.responses_per_step // self.trainer.updates_per_rollout // self.parallel.dp)

    @property
    def microbatch_multiple(self) -> int:
        """What divides an update's number of microbatches: stages that interleave take turns."""
        return self.parallel.pp if self.parallel.vpp > 1 else 1

    @property
    def most_microbatches(self) -> int:
        """Of an update on one data-parallel rank: as many as its responses fill where all are of full length."""
        count = -(-self.responses_per_rank // max(1, self.trainer.microbatch_tokens // self.longest))
        return count + -count % self.microbatch_multiple


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """YAML file plus ``key.sub=value`` overrides -> a checked Config.

    ``base: other.yaml`` or ``base: [a.yaml, b.yaml]``, beside the file, is read first; the file changes single keys of
    it, and a list as a whole. Raises ConfigError: a missing or malformed file, an unknown key (with the closest known
    one), a value of the wrong type, or a broken rule between keys.
    """
    tree = read_tree(Path(path))
    for override in overrides:
        apply_override(tree, override)
    config = from_dict(Config, tree)
    check(config)
    return config


def to_dict(config: Any) -> dict:
    """The config as plain values, ready for YAML."""
    return dataclasses.asdict(config)


def flat(tree: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """{"model": {"path": "m"}, "exploration": {}} -> {"model.path": "m", "exploration": {}}: keys as in an override."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{above}{key}"
        found |= flat(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return found


def as_yaml(config: Config) -> str:
    """The resolved config, byte for byte the same for the same values, whoever asks."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def dump(config: Config, path: Path) -> None:
    """Write the resolved config."""
    path.write_text(as_yaml(config))
