"""The shape of a model, read from a Hugging Face ``config.json`` with nothing but json.

    Architecture.from_folder("Qwen/Qwen3-0.6B").check_layout(tp=2, pp=2, vpp=1)

What the framework does not compute exactly is refused here, by name, before any process starts.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from megatron_rlvr.config import Config, ConfigError, rule

Family = Literal["qwen2", "qwen3", "llama", "qwen3_moe"]

# Megatron cuts the vocabulary evenly over the ranks; 128 columns a rank keep the matrix kernels aligned.
VOCAB_MULTIPLE = 128
MATERIALISED_LIMIT = 2**30  # bytes of one microbatch's logits; above it they are worth making twice to hold few


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretch of the positions: wavelengths beyond original / low_frequency are multiplied by ``factor``.

    Those below original / high_frequency stay, those between go over smoothly (arXiv 2407.21783; transformers'
    rope_type "llama3"). RopeScaling(factor=8.0, low_frequency=1.0, high_frequency=4.0, original_positions=8192)
    """

    factor: float
    low_frequency: float
    high_frequency: float
    original_positions: int


@dataclass(frozen=True)
class Experts:
    """The mixture that stands for each layer's MLP: Experts(count=128, per_token=8, ffn_size=768, normalised=True)."""

    count: int
    per_token: int
    ffn_size: int
    normalised: bool  # the weights of a token's experts sum to 1


@dataclass(frozen=True)
class Architecture:
    """A decoder.

    Architecture(family="qwen3", num_layers=28, hidden_size=1024, num_heads=16, num_kv_heads=8, head_dim=128,
                 ffn_size=3072, vocab_size=151936, tied=True, qk_norm=True, qkv_bias=False, rope_theta=1e6,
                 rms_eps=1e-6, max_positions=40960)
    """

    family: Family
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    tied: bool  # the output layer is the embedding
    qk_norm: bool  # RMSNorm over each query and key head
    qkv_bias: bool
    rope_theta: float
    rms_eps: float
    max_positions: int
    rope_scaling: RopeScaling | None = None
    experts: Experts | None = None

    @staticmethod
    def from_folder(path: str | Path, key: str = "model.path") -> Architecture:
        """Read ``path/config.json``. Raises ConfigError where it is absent, malformed or of a model we do not run.

        ``key`` is the config's name for the path, which errors begin with.
        """
        source = Path(path) / "config.json"
        rule(Path(path).is_dir(), f"{key}={str(path)!r} is not a folder: give a local Hugging Face model folder")
        rule(source.is_file(), f"{key}={str(path)!r} holds no config.json: give a Hugging Face model folder")
        try:
            tree = json.loads(source.read_text())
        except ValueError as error:
            raise ConfigError(f"{source} is not valid JSON: {error}") from error
        rule(isinstance(tree, dict), f"{source} must hold a JSON object")
        return _from_tree(tree, source)

    def check_layout(self, tp: int, pp: int, vpp: int, cp: int = 1, key: str = "parallel.") -> None:
        """Whether the policy can be cut into tp x cp x pp x vpp, which errors call KEYtp, ... Raises ConfigError."""
        parts = {
            "attention heads": self.num_heads,
            "key-value heads": self.num_kv_heads,
            "feed-forward columns": self.experts.ffn_size if self.experts else self.ffn_size,
        }
        for what, size in parts.items():
            rule(size % tp == 0, f"{key}tp={tp} must divide the model's {size} {what}")
        rule(
            self.num_heads % (tp * cp) == 0,
            f"{key}tp={tp} x {key}cp={cp} must divide the model's {self.num_heads} attention heads: each of "
            f"these ranks attends with some of them",
        )
        stages = f"{key}pp={pp}" + (f" x {key}vpp={vpp} = {pp * vpp} stages" if vpp > 1 else "")
        rule(self.num_layers % (pp * vpp) == 0, f"{stages} must divide the model's {self.num_layers} layers")

    def check_trains(self, key: str = "model.path") -> None:
        """Whether training runs it, and not conversion and evaluation alone. Raises ConfigError."""
        rule(
            self.experts is None,
            f"{key}: a {self.family} model is converted and evaluated here, but not trained: give a dense model",
        )

    def check_engine_layout(self, tp: int, key: str = "rollout.tp, or parallel.tp where that is 0") -> None:
        """Whether the rollout engine can be cut into tp ranks, which ``key`` sets. Raises ConfigError."""
        name = f"the rollout engine's tp={tp} ({key})"
        rule(self.num_heads % tp == 0, f"{name} must divide the model's {self.num_heads} attention heads")
        rule(self.ffn_size % tp == 0, f"{name} must divide the model's {self.ffn_size} feed-forward columns")
        rule(
            self.num_kv_heads % tp == 0 or tp % self.num_kv_heads == 0,
            f"{name} must divide the model's {self.num_kv_heads} key-value heads, or be a multiple of them",
        )

    def check_length(self, tokens: int, keys: str = "data.max_prompt_length + rollout.max_response_length") -> None:
        """Whether a sequence of ``tokens`` fits the positions the model knows; ``keys`` set it. Raises ConfigError."""
        rule(
            tokens <= self.max_positions,
            f"{keys} = {tokens} tokens, but the model's positions end at "
            f"{self.max_positions} (max_position_embeddings in its config.json): shorten one of the two",
        )

    def padded_vocab(self, tp: int) -> int:
        """Vocabulary rows in Megatron: the next multiple of 128 * tp; rows from vocab_size on are never a token."""
        multiple = VOCAB_MULTIPLE * tp
        return -(-self.vocab_size // multiple) * multiple

    def logits_form(self, config: Config) -> str:
        """``config.model.logits``, with what auto comes to: materialised, fused or fused_float32.

        Fused ones are never held as a whole: distributed/vocab_linear.py takes statistics from hidden states.
        """
        if config.model.logits != "auto":
            return config.model.logits
        if config.model.dtype == "bfloat16" and config.learns_from_older:
            return "fused_float32"
        columns = self.padded_vocab(config.parallel.tp) // config.parallel.tp
        held = config.trainer.microbatch_tokens // config.parallel.cp * columns * config.model.itemsize
        return "fused" if held > MATERIALISED_LIMIT else "materialised"

    def kv_size_per_token(self, tp: int) -> int:
        """Keys and values of all layers on one of ``tp`` engine ranks, which holds at least one key-value head."""
        return 2 * self.num_layers * max(1, self.num_kv_heads // tp) * self.head_dim

    @property
    def query_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim


def _from_tree(tree: dict[str, Any], source: Path) -> Architecture:
    family: Any = tree.get("model_type")
    supported = get_args(Family)
    rule(family in supported, f"{source}: model_type {family!r} is not supported; supported: {', '.join(supported)}")

    def need(key: str) -> int:
        value: Any = tree.get(key)
        rule(isinstance(value, int) and value > 0, f"{source}: {key} must be a positive integer, not {value!r}")
        return value

    heads, hidden = need("num_attention_heads"), need("hidden_size")
    rule(bool(tree.get("head_dim")) or hidden % heads == 0, f"{source}: {heads} heads must divide hidden_size {hidden}")
    if family != "llama":  # where one is absent transformers and vLLM take a number of their own
        for key in ("num_key_value_heads",) if family == "qwen2" else ("num_key_value_heads", "head_dim"):
            need(key)
    kv_heads = tree.get("num_key_value_heads") or heads
    rule(heads % kv_heads == 0, f"{source}: {kv_heads} key-value heads must divide the {heads} attention heads")
    _refuse_variants(tree, source)
    _refuse_two_ropes(tree, source)
    return Architecture(
        family=family,
        num_layers=need("num_hidden_layers"),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=tree.get("head_dim") or hidden // heads,
        ffn_size=need("intermediate_size"),
        vocab_size=need("vocab_size"),
        tied=bool(tree.get("tie_word_embeddings", False)),
        qk_norm=family in ("qwen3", "qwen3_moe"),
        qkv_bias=family == "qwen2",
        rope_theta=float(_rope(tree).get("rope_theta") or tree.get("rope_theta") or 10000.0),
        rms_eps=float(tree.get("rms_norm_eps", 1e-6)),
        max_positions=need("max_position_embeddings"),
        rope_scaling=_rope_scaling(tree, source),
        experts=_experts(tree, source) if family == "qwen3_moe" else None,
    )


def _rope_scaling(tree: dict[str, Any], source: Path) -> RopeScaling | None:
    rope = _rope(tree)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    rule(kind == "llama3", f"{source}: rope scaling {kind!r} is not supported, only 'default' (none) and 'llama3'")
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    for key in keys:
        value: Any = rope.get(key)
        sound = isinstance(value, int | float) and value > 0
        rule(sound, f"{source}: {key} of the rope scaling must be a positive number, not {value!r}")
    factor, low, high, positions = (rope[key] for key in keys)
    return RopeScaling(float(factor), float(low), float(high), int(positions))


def _experts(tree: dict[str, Any], source: Path) -> Experts:
    rule(
        not tree.get("mlp_only_layers") and tree.get("decoder_sparse_step", 1) == 1,
        f"{source}: dense layers among those with experts (mlp_only_layers, decoder_sparse_step) are not supported",
    )
    keys = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
    sizes: dict[str, Any] = {key: tree.get(key) for key in keys}
    sizes["num_experts"] = sizes["num_experts"] or tree.get("num_local_experts")  # as transformers 5 writes it
    for key, value in sizes.items():
        rule(isinstance(value, int) and value > 0, f"{source}: {key} must be a positive integer, not {value!r}")
    count, per_token, ffn_size = sizes.values()
    return Experts(count, per_token, ffn_size, normalised=bool(tree.get("norm_topk_prob", False)))


def _rope(tree: dict[str, Any]) -> dict[str, Any]:
    """transformers 5 writes ``rope_parameters``, earlier ones ``rope_theta`` and ``rope_scaling``."""
    return tree.get("rope_parameters") or tree.get("rope_scaling") or {}


def _refuse_two_ropes(tree: dict[str, Any], source: Path) -> None:
    """transformers and vLLM take rope_scaling alone where both are there, without the other's rope_theta."""
    new, old = tree.get("rope_parameters"), tree.get("rope_scaling")
    rule(
        not new or not old or new == old,
        f"{source}: rope_parameters {new} and rope_scaling {old} both say how positions turn, and differ: keep one of "
        f"them; rope_parameters is what transformers 5 writes, with rope_theta inside",
    )


def _refuse_variants(tree: dict[str, Any], source: Path) -> None:
    layers = set(tree.get("layer_types") or ["full_attention"])
    rule(
        not tree.get("use_sliding_window") and layers == {"full_attention"},
        f"{source}: sliding-window attention is not supported: set use_sliding_window to false",
    )
    rule(
        tree.get("hidden_act", "silu") == "silu",
        f"{source}: hidden_act {tree.get('hidden_act')!r} is not supported, only 'silu'",
    )
    for key in ("attention_bias", "mlp_bias"):
        rule(
            tree["model_type"] == "qwen2" or not tree.get(key),
            f"{source}: {key} is not supported for {tree['model_type']}",
        )
