"""Rules between the keys of a config, and what its batch sizes come to; each broken rule says why it is one."""

from __future__ import annotations

from operator import attrgetter
from pathlib import PurePath
from typing import TYPE_CHECKING

from megatron_rlvr.config_reading import rule

if TYPE_CHECKING:  # config.py imports this file
    from megatron_rlvr.config import AlgorithmConfig, Config, DataConfig, OptimizerConfig


def check(config: Config) -> None:
    """Every rule between keys that needs nothing but the config. Raises ConfigError."""
    _check_ranges(config)
    for section, optimizer in {"optimizer": config.optimizer, "critic.optimizer": config.critic.optimizer}.items():
        _check_optimizer(section, optimizer)
    _check_algorithm(config.algorithm)
    _check_reward(config)
    _check_batch(config)
    if config.has_critic:
        _check_critic(config)
    parallel, world = config.parallel, config.world_size
    rule(
        world % config.rollout_tp == 0,
        f"rollout.tp={config.rollout_tp} must divide the number of ranks tp*cp*pp*dp={world}: "
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
    _check_data(config.data)
    _check_kept(config)


def _check_kept(config: Config) -> None:
    trainer, held_out = config.trainer, bool(config.data.held_out_sources)
    best, save, measure = trainer.keep_best, trainer.save_every, trainer.eval_every
    rule(
        best == 0 or save > 0,
        f"trainer.keep_best={best} needs trainer.save_every: with 0 a run writes one checkpoint, at its end",
    )
    rule(
        best == 0 or (held_out and measure > 0 and save % measure == 0),
        f"trainer.keep_best={best} needs held-out figures of every checkpoint: set data.eval_path, and "
        f"trainer.eval_every (now {measure}) so that it divides trainer.save_every ({save})",
    )


def _check_data(data: DataConfig) -> None:
    rule(bool(data.path or data.sources), "data.path is not set: give the file that holds the prompts")
    for one, several in (("path", "sources"), ("eval_path", "eval_sources")):
        path, sources = getattr(data, one), getattr(data, several)
        rule(
            not (path and sources),
            f"data.{one}={path} and data.{several} are both set: list the file in data.{several}, or drop them",
        )
        for index, source in enumerate(sources):
            rule(bool(source.path), f"data.{several}[{index}] has no path: give the file that holds its prompts")
            rule(
                source.weight > 0,
                f"data.{several}[{index}].weight must be above 0, not {source.weight}: drop the source to leave it out",
            )
            rule(
                source.weight == 1 or several == "sources",
                f"data.{several}[{index}].weight={source.weight}: an evaluation takes each prompt once",
            )


AT_LEAST = {
    1: [
        *("parallel.tp", "parallel.cp", "parallel.pp", "parallel.vpp", "parallel.dp"),
        *("rollout.prompts_per_step", "rollout.responses_per_prompt", "rollout.max_response_length"),
        *("rollout.kv_cache_mib", "rollout.max_running", "reward.workers", "data.max_prompt_length"),
        *("trainer.updates_per_rollout", "trainer.num_steps", "trainer.keep_last", "trainer.eval_responses"),
    ],
    0: [
        *("rollout.tp", "trainer.eval_every", "trainer.save_every", "trainer.keep_best", "trainer.log_rollouts"),
        "logging.record_responses",
    ],
}


def _check_ranges(config: Config) -> None:
    for least, names in AT_LEAST.items():
        for name in names:
            value = attrgetter(name)(config)
            rule(value >= least, f"{name} must be at least {least}, not {value}")
    temperatures: dict[str, float] = {"rollout.temperature": config.rollout.temperature}
    if config.trainer.eval_temperature is not None:
        temperatures["trainer.eval_temperature"] = config.trainer.eval_temperature
    for name, temperature in temperatures.items():
        rule(
            0.01 <= temperature <= 2,
            f"{name} must be in [0.01, 2], not {temperature}: greedy decoding has no log-probs to learn from or to "
            f"measure perplexities by, the engine takes less than 0.01 as 0.01, and refuses more than 2",
        )
    hang = config.run.hang_timeout
    rule(hang > 0, f"run.hang_timeout must be above 0 seconds, not {hang}")
    port = config.run.port
    rule(0 <= port < 2**16, f"run.port must be in 0..65535, not {port}: it is a TCP port, or 0 for a free one")
    parts = PurePath(config.name).parts
    rule(
        bool(config.run.dir) or (parts != () and ".." not in parts and parts[0] != "/"),
        f"name={config.name!r} is no name for a folder in runs/: give a plain one, or set run.dir",
    )
    rule(0 <= config.model.dropout < 1, f"model.dropout must be in [0, 1), not {config.model.dropout}")
    utilization = config.rollout.gpu_memory_utilization
    rule(
        0 < utilization <= 1,
        f"rollout.gpu_memory_utilization must be in (0, 1], not {utilization}: it is the engine's share of a GPU",
    )


def _check_optimizer(section: str, optimizer: OptimizerConfig) -> None:
    rule(optimizer.lr > 0, f"{section}.lr must be above 0, not {optimizer.lr}")
    rule(
        len(optimizer.betas) == 2 and all(0 <= beta < 1 for beta in optimizer.betas),
        f"{section}.betas must hold two numbers in [0, 1), not {optimizer.betas}: each is what a mean keeps per update",
    )
    rule(optimizer.eps > 0, f"{section}.eps must be above 0, not {optimizer.eps}: it keeps Adam from dividing by 0")
    for name in ("min_lr", "weight_decay", "warmup_steps", "clip_grad"):
        value = getattr(optimizer, name)
        rule(value >= 0, f"{section}.{name} must be at least 0, not {value}")
    rule(
        optimizer.min_lr <= optimizer.lr,
        f"{section}.min_lr={optimizer.min_lr} must be at most {section}.lr={optimizer.lr}: the rate decays to it",
    )
    rule(
        not optimizer.min_lr or optimizer.schedule != "constant",
        f"{section}.min_lr={optimizer.min_lr} is where a rate ends that decays, and {section}.schedule=constant does "
        f"not: drop one of them",
    )


def _check_algorithm(algorithm: AlgorithmConfig) -> None:
    rule(
        algorithm.dual_clip == 0 or algorithm.dual_clip > 1,
        f"algorithm.dual_clip must be above 1 (or 0 for off), not {algorithm.dual_clip}: "
        f"it bounds a ratio that is 1 on-policy",
    )
    rule(
        algorithm.kl.coefficient >= 0,
        f"algorithm.kl.coefficient must be at least 0, not {algorithm.kl.coefficient}: below 0 it would drive "
        f"the policy away from the reference",
    )
    rule(
        algorithm.kl.k3_clamp >= 0,
        f"algorithm.kl.k3_clamp must be above 0 (or 0 for no bound), not {algorithm.kl.k3_clamp}",
    )
    rule(
        algorithm.loss == "ppo" or not algorithm.dual_clip,
        f"algorithm.dual_clip is a part of algorithm.loss=ppo and has no effect with {algorithm.loss}: "
        f"drop one of them",
    )
    rule(
        algorithm.loss != "gspo" or algorithm.reduction == "sequence_mean",
        f"algorithm.loss=gspo needs algorithm.reduction=sequence_mean, not {algorithm.reduction}: "
        f"its ratio belongs to a response, which must count once whatever its length",
    )
    rule(
        0 <= algorithm.clip_low <= 1,
        f"algorithm.clip_low must be in [0, 1], not {algorithm.clip_low}: a ratio is never negative",
    )
    rule(
        algorithm.clip_high >= 0,
        f"algorithm.clip_high must be at least 0, not {algorithm.clip_high}: on-policy the ratio is 1",
    )


def _check_reward(config: Config) -> None:
    rule(config.reward.deadline > 0, f"reward.deadline must be above 0 seconds, not {config.reward.deadline:g}")
    share = config.reward.max_error_share
    rule(0 <= share <= 1, f"reward.max_error_share must be in [0, 1], not {share:g}: it is a share of the responses")
    names = {term.rpartition("*")[2].strip() for term in config.verifier.split("+")}
    rule(
        config.reward.scale == "verifier" or "dapo" not in names,
        "reward.scale=signed maps 0..1 to -1..+1, and verifier=dapo gives -1 and +1 already: drop one of them",
    )


def _check_batch(config: Config) -> None:
    rollout, updates, dp = config.rollout, config.trainer.updates_per_rollout, config.parallel.dp
    rule(
        rollout.prompts_per_step % updates == 0,
        f"trainer.updates_per_rollout={updates} must divide rollout.prompts_per_step={rollout.prompts_per_step}: "
        f"each update takes whole groups",
    )
    responses, interleaved = config.responses_per_step // updates, config.microbatch_multiple
    rule(
        responses % (dp * interleaved) == 0,
        f"an update has {responses} responses, which parallel.dp={dp}"
        + (f" x parallel.pp={interleaved} (stages of parallel.vpp interleave)" if interleaved > 1 else "")
        + " must divide: every data-parallel rank runs the same number of microbatches",
    )
    rule(
        config.trainer.microbatch_tokens >= config.longest,
        f"trainer.microbatch_tokens={config.trainer.microbatch_tokens} must hold the longest response with its prompt: "
        f"data.max_prompt_length + rollout.max_response_length = {config.longest}",
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
    responses = config.responses_per_step // config.trainer.updates_per_rollout
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
    responses = config.responses_per_step
    per_update = responses // trainer.updates_per_rollout
    replicas = config.world_size // config.rollout_tp
    return [
        ("ranks", f"{config.world_size}", f"tp {parallel.tp} x cp {parallel.cp} x pp {parallel.pp} x dp {parallel.dp}"),
        ("engine replicas", f"{replicas}", f"{config.world_size} ranks / rollout.tp {config.rollout_tp}"),
        ("prompts per step", f"{rollout.prompts_per_step}", "rollout.prompts_per_step"),
        ("responses per step", f"{responses}", f"prompts x {rollout.responses_per_prompt} responses each"),
        (
            "tokens per step",
            f"<= {responses * config.longest}",
            f"responses x (prompt <= {config.data.max_prompt_length} + response <= {rollout.max_response_length})",
        ),
        ("updates per step", f"{trainer.updates_per_rollout}", "trainer.updates_per_rollout, each over whole groups"),
        ("responses per update", f"{per_update}", f"over {parallel.dp} data-parallel rank(s)"),
        (
            "microbatches per update and rank",
            f"<= {config.most_microbatches}",
            f"packed to {trainer.microbatch_tokens} tokens each",
        ),
        (
            "steps",
            f"{trainer.num_steps}",
            f"{trainer.num_steps * trainer.updates_per_rollout} optimizer updates in all",
        ),
    ]
