"""The configuration: dataclasses read from YAML, changed by dotted overrides, checked before anything starts.

    config = load_config("examples/countdown_cpu/config.yaml", ["parallel.tp=2", "exploration.lp_reg.rho=0.05"])

Every mistake is a ConfigError that names the key, the rule, the value and the way out.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import yaml


class ConfigError(ValueError):
    """A configuration that cannot run; the message is meant for the person who wrote it."""


@dataclass
class ModelConfig:
    path: str = ""  # a Hugging Face folder: config.json, tokenizer, safetensors
    random_init: bool = False  # take the shape from config.json and draw the weights from `seed`
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    recompute: Literal["none", "selective", "full"] = "none"  # activations recomputed in the backward pass
    # fused: a few rows of logits at a time, made again in the backward; auto: where all would take more than 1 GiB
    logits: Literal["auto", "materialised", "fused"] = "auto"
    dropout: float = 0.0


@dataclass
class ParallelConfig:
    tp: int = 1  # tensor-parallel ranks
    pp: int = 1  # pipeline stages
    vpp: int = 1  # virtual stages (model chunks) per pipeline stage
    dp: int = 1  # data-parallel replicas; tp * pp * dp ranks in all
    sequence_parallel: bool = False  # shard norms and dropout over the tensor-parallel ranks


@dataclass
class DataConfig:
    path: str = ""  # .jsonl, .parquet or a folder of arrow files
    eval_path: str = ""  # held-out prompts; empty: no evaluation
    prompt_field: str = ""  # empty: detected from the first row
    answer_field: str = ""
    # chat: the tokenizer's own; dapo: DAPO's wrapper inside that; r1_zero: DeepSeek-R1-Zero's for base models; raw: the
    # prompt's text as it is
    template: Literal["chat", "dapo", "r1_zero", "raw"] = "chat"
    max_prompt_length: int = 1024  # tokens
    strict: bool = False  # stop at the first row that cannot be used, instead of counting and dropping it
    shuffle: bool = True


@dataclass
class RewardConfig:
    scale: Literal["verifier", "signed"] = "verifier"  # signed: 0..1 mapped to -1..+1
    workers: int = 2  # verifier processes per scoring rank
    deadline: float = 10.0  # seconds per answer
    max_error_share: float = 0.1  # of a step's verdicts; above it the run stops


@dataclass
class RolloutConfig:
    prompts_per_step: int = 32
    responses_per_prompt: int = 8
    max_response_length: int = 1024  # tokens
    temperature: float = 1.0
    tp: int = 0  # tensor-parallel ranks of the engine; 0: as many as the policy's
    kv_cache_mib: int = 256  # on the CPU; a GPU takes `gpu_memory_utilization`
    gpu_memory_utilization: float = 0.5
    max_running: int = 256  # sequences that the engine decodes together


@dataclass
class KlConfig:
    """Distance from the frozen model that the run starts from; that model is only built where it is needed."""

    coefficient: float = 0.0  # loss, or reward, per nat of KL(policy || reference)
    # From the sampled token: k1 is the log-ratio, k2 half its square, k3 never negative with k1's mean. In the loss, k1
    # has no gradient on average, k2 has that of KL(policy || reference), k3 that of KL(reference || policy).
    estimator: Literal["k1", "k2", "k3"] = "k3"
    where: Literal["loss", "reward"] = "loss"  # reward: of the old policy, summed over the response


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
    lr: float = 1e-6
    min_lr: float = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0  # optimizer updates
    weight_decay: float = 0.0  # on matrices only
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    clip_grad: float = 1.0
    distributed: bool = True  # optimizer state sharded over the data-parallel ranks


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
    eval_every: int = 0  # steps; 0: never
    eval_responses: int = 16  # per held-out prompt
    save_every: int = 0  # steps; 0: only at the end
    log_rollouts: int = 8  # responses written to rollouts.jsonl per step


@dataclass
class RunConfig:
    dir: str = ""  # empty: runs/NAME
    resume: Literal["never", "auto", "must"] = "never"
    overwrite: bool = False  # replace an earlier run in the same folder
    port: int = 0  # where the ranks of one machine meet; 0: a free one


@dataclass
class LoggingConfig:
    tensorboard: bool = True
    wandb_project: str = ""  # empty: off
    progress: Literal["auto", "bar", "lines", "none"] = "auto"


@dataclass
class Config:
    name: str = "run"
    seed: int = 0
    prepare: str = ""  # a Python script that makes `model.path` and `data.path`; run once where model.path is missing
    verifier: str = ""
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
    def rollout_tp(self) -> int:
        return self.rollout.tp or self.parallel.tp

    @property
    def world_size(self) -> int:
        return self.parallel.tp * self.parallel.pp * self.parallel.dp


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """YAML file plus ``key.sub=value`` overrides -> a checked Config.

    ``base: other.yaml`` or ``base: [a.yaml, b.yaml]``, beside the file, is read first; the file changes single keys of
    it, and a list as a whole. Raises ConfigError: a missing or malformed file, an unknown key (with the closest known
    one), a value of the wrong type, or a broken rule between keys.
    """
    tree = _read_tree(Path(path), ())
    for override in overrides:
        _apply_override(tree, override)
    config = from_dict(Config, tree)
    check(config)
    return config


def _read_tree(path: Path, includers: tuple[Path, ...]) -> dict:
    """The file's keys over those of its bases; ``includers`` are the files that lead here."""
    if path.resolve() in includers:
        raise ConfigError(f"{path} includes itself: {' -> '.join(str(item) for item in (*includers, path.resolve()))}")
    try:
        text = path.read_text()
    except OSError as error:
        by = f", a base of {includers[-1]}" if includers else ""
        raise ConfigError(f"cannot read the config {path}{by}: {error.strerror}") from error
    try:
        tree = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a mapping of keys to values, not a {type(tree).__name__}")
    bases = tree.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"{path}: base must be the name of a config file or a list of them, not {bases!r}")
    merged: dict = {}
    for base in bases:
        _merge(merged, _read_tree(path.parent / base, (*includers, path.resolve())))
    _merge(merged, tree)
    return merged


def _merge(into: dict, tree: dict) -> None:
    """The keys of ``tree`` over those of ``into``, level by level."""
    for key, value in tree.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _apply_override(tree: dict, override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r} must look like key.sub=value")
    node = tree
    *parents, leaf = key.split(".")
    for parent in parents:
        node = node.setdefault(parent, {})
        if node is None or not isinstance(node, dict):
            raise ConfigError(f"override {override!r}: {parent!r} holds a value, not keys")
    try:
        node[leaf] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: {text!r} is not a YAML value") from error


def from_dict(cls: type, tree: Any, path: str = "") -> Any:
    """A mapping -> a dataclass of type ``cls``; ``path`` is what errors call it ("exploration.lp_reg")."""
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path or 'the config'} must be a mapping of keys to values, not {tree!r}")
    hints = typing.get_type_hints(cls)
    known = [item.name for item in fields(cls)]
    values = {}
    for key, value in tree.items():
        name = f"{path}.{key}" if path else str(key)
        if key not in known:
            raise ConfigError(f"unknown key {name!r}{_closest(str(key), known, path)}")
        values[key] = _convert(hints[key], value, name)
    return cls(**values)


def _closest(key: str, known: list[str], path: str) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    prefix = f"{path}." if path else ""
    return f"; did you mean {prefix + close[0]!r}?" if close else f"; {path} takes no keys"


def _convert(hint: Any, value: Any, name: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, name)
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(f"{name} must be one of {', '.join(map(repr, arguments))}, not {value!r}")
        return value
    if origin in (typing.Union, types.UnionType):
        return _convert_union(arguments, value, name)
    if origin is list:
        if not isinstance(value, list):
            raise ConfigError(f"{name} must be a list, not {value!r}")
        return [_convert(arguments[0], item, f"{name}[{index}]") for index, item in enumerate(value)]
    if origin is dict:
        if value is None:  # `exploration: null` takes away what a base file switched on
            return {}
        if not isinstance(value, dict):
            raise ConfigError(f"{name} must be a mapping, not {value!r}")
        return {key: {} if item is None else item for key, item in value.items()}
    return _convert_scalar(hint, value, name)


def _convert_union(arguments: tuple, value: Any, name: str) -> Any:
    if value is None and type(None) in arguments:
        return None
    problems = []
    for argument in arguments:
        if argument is type(None):
            continue
        try:
            return _convert(argument, value, name)
        except ConfigError as error:
            problems.append(str(error))
    raise ConfigError("; or ".join(problems))


def _convert_scalar(hint: Any, value: Any, name: str) -> Any:
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 1e-6 as text
        try:
            return float(value)
        except ValueError:
            pass
    if hint is str and value is None:  # `key=` on the command line, `key:` in the file
        return ""
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"{name} must be of type {hint.__name__}, not {value!r}")
    return value


def to_dict(config: Any) -> dict:
    """The config as plain values, ready for YAML."""
    return dataclasses.asdict(config)


def dump(config: Config, path: Path) -> None:
    """Write the resolved config, byte for byte the same for the same values."""
    path.write_text(yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True))


def rule(condition: bool, message: str) -> None:
    """Raise ConfigError(message) unless the rule holds."""
    if not condition:
        raise ConfigError(message)


def check(config: Config) -> None:
    """Every rule between keys that needs nothing but the config. Raises ConfigError."""
    _check_ranges(config)
    _check_batch(config)
    if config.has_critic:
        _check_critic(config)
    parallel, world = config.parallel, config.world_size
    rule(
        world % config.rollout_tp == 0,
        f"rollout.tp={config.rollout_tp} must divide the number of ranks tp*pp*dp={world}: "
        f"each engine replica takes that many ranks",
    )
    rule(
        parallel.vpp == 1 or parallel.pp > 1,
        f"parallel.vpp={parallel.vpp} needs parallel.pp > 1: one stage has nothing to interleave",
    )
    rule(
        not parallel.sequence_parallel or parallel.tp > 1,
        "parallel.sequence_parallel needs parallel.tp > 1: it shards over the tensor-parallel ranks",
    )
    rule(
        bool(config.verifier), "verifier is not set: name the one that scores the responses, for example verifier=math"
    )
    rule(
        bool(config.model.path),
        "model.path is not set: give a Hugging Face folder (config.json, tokenizer, safetensors)",
    )
    rule(bool(config.data.path), "data.path is not set: give the file that holds the prompts")


def _check_ranges(config: Config) -> None:
    at_least_one = {
        "parallel.tp": config.parallel.tp,
        "parallel.pp": config.parallel.pp,
        "parallel.vpp": config.parallel.vpp,
        "parallel.dp": config.parallel.dp,
        "rollout.prompts_per_step": config.rollout.prompts_per_step,
        "rollout.responses_per_prompt": config.rollout.responses_per_prompt,
        "rollout.max_response_length": config.rollout.max_response_length,
        "trainer.updates_per_rollout": config.trainer.updates_per_rollout,
        "trainer.num_steps": config.trainer.num_steps,
        "reward.workers": config.reward.workers,
        "data.max_prompt_length": config.data.max_prompt_length,
    }
    for name, value in at_least_one.items():
        rule(value >= 1, f"{name} must be at least 1, not {value}")
    rule(
        0 < config.rollout.temperature <= 2,
        f"rollout.temperature must be in (0, 2], not {config.rollout.temperature}: "
        f"greedy decoding has no log-probs to learn from, and the engine refuses more than 2",
    )
    rule(0 <= config.model.dropout < 1, f"model.dropout must be in [0, 1), not {config.model.dropout}")
    for section, settings in {"optimizer": config.optimizer, "critic.optimizer": config.critic.optimizer}.items():
        rule(settings.lr > 0, f"{section}.lr must be above 0, not {settings.lr}")
        rule(len(settings.betas) == 2, f"{section}.betas must hold two numbers, not {settings.betas}")
    rule(
        config.algorithm.dual_clip == 0 or config.algorithm.dual_clip > 1,
        f"algorithm.dual_clip must be above 1 (or 0 for off), not {config.algorithm.dual_clip}: "
        f"it bounds a ratio that is 1 on-policy",
    )
    rule(
        config.algorithm.kl.coefficient >= 0,
        f"algorithm.kl.coefficient must be at least 0, not {config.algorithm.kl.coefficient}: below 0 it would drive "
        f"the policy away from the reference",
    )
    rule(
        not (config.has_critic and config.algorithm.kl.coefficient and config.algorithm.kl.where == "reward"),
        "algorithm.kl.where=reward belongs to the advantages without a critic: with algorithm.advantage=gae set "
        "algorithm.kl.where=loss",
    )
    rule(
        config.algorithm.loss == "ppo" or not config.algorithm.dual_clip,
        f"algorithm.dual_clip is a part of algorithm.loss=ppo and has no effect with {config.algorithm.loss}: "
        f"drop one of them",
    )
    rule(
        config.algorithm.loss != "gspo" or config.algorithm.reduction == "sequence_mean",
        f"algorithm.loss=gspo needs algorithm.reduction=sequence_mean, not {config.algorithm.reduction}: "
        f"its ratio belongs to a response, which must count once whatever its length",
    )
    rule(
        0 <= config.algorithm.clip_low <= 1,
        f"algorithm.clip_low must be in [0, 1], not {config.algorithm.clip_low}: a ratio is never negative",
    )


def _check_batch(config: Config) -> None:
    rollout, updates, dp = config.rollout, config.trainer.updates_per_rollout, config.parallel.dp
    rule(
        rollout.prompts_per_step % updates == 0,
        f"trainer.updates_per_rollout={updates} must divide rollout.prompts_per_step={rollout.prompts_per_step}: "
        f"each update takes whole groups",
    )
    responses = rollout.prompts_per_step // updates * rollout.responses_per_prompt
    interleaved = config.parallel.pp if config.parallel.vpp > 1 else 1
    rule(
        responses % (dp * interleaved) == 0,
        f"an update has {responses} responses, which parallel.dp={dp}"
        + (f" x parallel.pp={interleaved} (stages of parallel.vpp interleave)" if interleaved > 1 else "")
        + " must divide: every data-parallel rank runs the same number of microbatches",
    )
    longest = config.data.max_prompt_length + rollout.max_response_length
    rule(
        config.trainer.microbatch_tokens >= longest,
        f"trainer.microbatch_tokens={config.trainer.microbatch_tokens} must hold the longest response with its prompt: "
        f"data.max_prompt_length + rollout.max_response_length = {longest}",
    )


def _check_critic(config: Config) -> None:
    critic = config.critic
    rule(critic.num_heads >= 1, f"critic.num_heads must be at least 1, not {critic.num_heads}: the value is their mean")
    rule(critic.head_init > 0, f"critic.head_init must be above 0, not {critic.head_init}: heads would start as one")
    rule(
        0 < critic.share <= 1,
        f"critic.share must be in (0, 1], not {critic.share}: it is the share of the data that a head learns from",
    )
    rule(
        critic.share * critic.num_heads >= 1,
        f"critic.share={critic.share} of critic.num_heads={critic.num_heads} head(s) adds up to less than the whole "
        f"batch, so that some of it would teach no head: raise one of them",
    )
    responses = config.rollout.prompts_per_step * config.rollout.responses_per_prompt
    responses //= config.trainer.updates_per_rollout
    rule(
        critic.share_of == "tokens" or critic.share * responses >= 1,
        f"critic.share={critic.share} of an update's {responses} responses is less than one, which leaves a head "
        f"without data: raise it, or set critic.share_of=tokens",
    )
    for name, value in (("gamma", critic.gamma), ("lam", critic.lam)):
        rule(0 <= value <= 1, f"critic.{name} must be in [0, 1], not {value}: it is a discount per token")
    rule(critic.value_clip >= 0, f"critic.value_clip must be at least 0 (0: off), not {critic.value_clip}")
    rule(
        0 <= critic.warmup_steps < config.trainer.num_steps,
        f"critic.warmup_steps={critic.warmup_steps} must be below trainer.num_steps={config.trainer.num_steps} and not "
        f"negative: the policy learns in the steps behind them",
    )


def batch_table(config: Config) -> list[tuple[str, str, str]]:
    """(what, value, how it comes about): what each batch size means, printed once at the start of a run."""
    rollout, trainer, parallel = config.rollout, config.trainer, config.parallel
    responses = rollout.prompts_per_step * rollout.responses_per_prompt
    longest = config.data.max_prompt_length + rollout.max_response_length
    per_update = responses // trainer.updates_per_rollout
    most = max(1, -(-per_update // parallel.dp) // max(1, trainer.microbatch_tokens // longest))
    replicas = config.world_size // config.rollout_tp
    return [
        ("ranks", f"{config.world_size}", f"tp {parallel.tp} x pp {parallel.pp} x dp {parallel.dp}"),
        ("engine replicas", f"{replicas}", f"{config.world_size} ranks / rollout.tp {config.rollout_tp}"),
        ("prompts per step", f"{rollout.prompts_per_step}", "rollout.prompts_per_step"),
        ("responses per step", f"{responses}", f"prompts x {rollout.responses_per_prompt} responses each"),
        (
            "tokens per step",
            f"<= {responses * longest}",
            f"responses x (prompt <= {config.data.max_prompt_length} + response <= {rollout.max_response_length})",
        ),
        ("updates per step", f"{trainer.updates_per_rollout}", "trainer.updates_per_rollout, each over whole groups"),
        ("responses per update", f"{per_update}", f"over {parallel.dp} data-parallel rank(s)"),
        ("microbatches per update and rank", f"<= {most}", f"packed to {trainer.microbatch_tokens} tokens each"),
        (
            "steps",
            f"{trainer.num_steps}",
            f"{trainer.num_steps * trainer.updates_per_rollout} optimizer updates in all",
        ),
    ]
