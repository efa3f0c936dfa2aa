"""What an evaluation is asked for; tools/evaluate.py makes a flag of every field."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from megatron_rlvr.config import DataConfig, RewardConfig, from_dict, rule


def option(default: Any, what: str) -> Any:
    return field(default=default, metadata={"help": what})


@dataclass
class Settings:
    """The fields from ``batch`` on decide only how fast it goes, and what it gives up at."""

    model: str
    output: str
    benchmarks: list[str]
    data: str = option("", "folder of the benchmarks' files; without it they come from the hub")
    critic: str = option("", "checkpoint or folder of a critic whose heads' disagreement is measured too")
    verifier: str = option("math", "of benchmarks that are files of your own")
    prompt_field: str = option("", "of benchmarks that are files of your own, where it is not found by itself")
    answer_field: str = option("", "the same for the answer")
    samples: int = option(1, "samples of each problem")
    temperature: float = option(0.6, "0: greedy")
    top_p: float = option(0.95, "share of the probability that is sampled from")
    max_tokens: int = option(4096, "of a response; longer ones are cut off")
    template: str = option("chat", "prompt template: chat, boxed, dapo, r1_zero or raw")
    seed: int = option(0, "another seed draws other samples")
    dtype: str = option("auto", "float32, bfloat16, or auto: as the model was saved, but no wider than 16 bits")
    batch: int = option(2048, "responses that are sampled, judged and written together")
    max_running: int = option(256, "responses that are decoded together")
    tp: int = option(1, "GPUs that the model is spread over")
    kv_cache_mib: int = option(1024, "key-value cache on a CPU")
    gpu_memory: float = option(0.9, "share of a GPU that the engine takes; less leaves room for a critic")
    workers: int = option(2, "verifier processes")
    deadline: float = option(10.0, "CPU seconds of judging one response; six times as much wall time ends it too")
    max_error_share: float = option(
        RewardConfig().max_error_share, "of the verdicts; the evaluation stops where the verifier fails on more"
    )

    def check(self) -> None:
        """Raises ConfigError."""
        for name in ("samples", "max_tokens", "batch", "max_running", "tp", "kv_cache_mib", "workers"):
            self._rule(name, getattr(self, name) >= 1, "be at least 1")
        self._rule("temperature", 0 <= self.temperature <= 2, "be in [0, 2]")
        self._rule("top_p", 0 < self.top_p <= 1, "be in (0, 1]")
        self._rule("dtype", self.dtype in ("auto", "float32", "bfloat16"), "be auto, float32 or bfloat16")
        self._rule("gpu_memory", 0 < self.gpu_memory <= 1, "be in (0, 1]")
        self._rule("max_error_share", 0 <= self.max_error_share <= 1, "be in [0, 1]")
        self._rule("deadline", 0 < self.deadline < math.inf, "be above 0 seconds and have an end")

    def _rule(self, name: str, condition: bool, must: str) -> None:
        rule(condition, f"--{name.replace('_', '-')} must {must}, not {getattr(self, name)}")

    def data_config(self) -> DataConfig:
        """How prompts are read: whatever their length. Raises ConfigError."""
        return from_dict(DataConfig, {"template": self.template, "max_prompt_length": 1 << 30})

    def identity(self) -> dict[str, Any]:
        """What two samples must share, beside the models, to belong into one folder: all that shapes a sample."""
        names = ("verifier", "template", "temperature", "top_p", "max_tokens", "seed", "dtype")
        return {name: getattr(self, name) for name in names}
