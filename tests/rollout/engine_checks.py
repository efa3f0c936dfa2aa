"""Run on each rank by test_vllm_engine.py: one real engine, every check on it, the outcome as JSON.

python -m tests.rollout.engine_checks FOLDER FAMILY TIED TP
"""

from __future__ import annotations

import json
import math
import os
import random
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy
import torch
import torch.distributed as dist

from megatron_rlvr import platform
from megatron_rlvr.architecture import Architecture
from megatron_rlvr.config import Config, DataConfig, ModelConfig, RolloutConfig
from megatron_rlvr.distributed import groups as process_groups
from megatron_rlvr.distributed.groups import ParallelGroups
from megatron_rlvr.rollout.engine import EngineNotReady, Request, Sample
from megatron_rlvr.rollout.vllm_engine import VllmEngine
from megatron_rlvr.weights import weight_sync
from megatron_rlvr.weights.weight_sync import SyncReport, WeightSync, WeightSyncError
from tests.weights.tiny_models import END, make_model, save_model, weights_of

PROMPTS = [[5, 6, 7, 8], [9, 10], [20, 21, 22, 23, 24, 25, 26]]


def raises(error: type[Exception], call: Callable) -> str:
    try:
        call()
    except error as caught:
        return str(caught)
    raise AssertionError(f"no {error.__name__}")


class Checks:
    """Methods run in the order in which they are written; each leaves the engine as the next one needs it."""

    def __init__(self, folder: Path, family: str, tied: bool, tp: int) -> None:
        self.groups = ParallelGroups.from_grid(tp=tp)
        self.family, self.tied = family, tied
        if self.groups.rank == 0:
            save_model(folder, family, tied)
        dist.barrier()
        self.config = Config(
            model=ModelConfig(path=str(folder), dtype="float32"),
            rollout=RolloutConfig(tp=tp, max_response_length=12, kv_cache_mib=16),
            data=DataConfig(max_prompt_length=16),
        )
        before = _process_state()
        self.engine = VllmEngine(self.config, self.groups, most_log_probs=5)
        self.left_alone = before == _process_state()
        self.sync = WeightSync(self.engine, Architecture.from_folder(folder), self.groups)
        self.use_model(seed=0)

    def use_model(self, seed: int) -> None:
        self.model = make_model(self.family, self.tied, seed)
        self.weights = {name: tensor.to(platform.device()) for name, tensor in weights_of(self.model).items()}

    def push(self) -> SyncReport:
        return self.sync.push(iter(self.weights.items()))

    def generate(self, temperature: float = 1.0) -> list[Sample]:
        requests = [Request(prompt, 100 + index, 12, temperature) for index, prompt in enumerate(PROMPTS)]
        return self.engine.generate(requests)

    def differs_from_transformers(self, samples: list[Sample], temperature: float) -> float:
        """The largest difference of any sampled token's log-prob."""
        worst = 0.0
        for prompt, sample in zip(PROMPTS, samples, strict=True):
            with torch.no_grad():
                logits = self.model(torch.tensor([prompt + sample.response_ids])).logits[0, len(prompt) - 1 : -1]
            log_probs = (logits / temperature).log_softmax(-1).gather(1, torch.tensor(sample.response_ids)[:, None])
            worst = max(worst, float((log_probs[:, 0] - torch.tensor(sample.log_probs)).abs().max()))
        return worst

    def check_construction_leaves_the_process_alone(self) -> None:
        assert self.left_alone

    def check_segments_have_no_name(self) -> None:
        dist.barrier()
        assert not _segments() & set(os.listdir("/dev/shm")), os.listdir("/dev/shm")
        assert not os.listdir(os.environ["VLLM_RPC_BASE_PATH"]), "its queues' sockets"

    def check_a_new_engine_does_not_generate(self) -> None:
        assert not self.engine.ready
        assert "push them first" in raises(EngineNotReady, self.generate)

    def check_push_proves_every_element(self) -> None:
        report = self.push()
        assert report.verified
        assert self.engine.ready
        assert report.share == 1.0
        assert report.checked == len(self.weights) + self.tied
        assert report.bytes == sum(tensor.nbytes for tensor in self.weights.values())

    def check_held_values_are_the_policys(self) -> None:
        for name, places in self.sync.plan.items():
            for place in places:
                whole = self.weights[name]
                part = whole[place.rows] if whole.dim() == 1 else whole[place.rows][:, place.columns]
                window = slice(0, part.shape[-1])
                assert torch.equal(self.engine.held(place.parameter, window)[place.held_rows], part), name

    def check_log_probs_are_those_of_transformers(self) -> None:
        for temperature in (1.0, 0.7):
            assert self.differs_from_transformers(self.generate(temperature), temperature) < 3e-5

    def check_prompts_that_do_not_fit_one_step(self) -> None:
        """More tokens than vLLM takes at a time: on a CPU, a prompt that is cut would end it."""
        requests = [Request(PROMPTS[0] * 6, seed, 1, 1.0) for seed in range(300)]
        ended: list[int] = []
        samples = self.engine.generate(requests, ended.append)
        assert sum(ended) == 300 and len(ended) > 1
        alone = self.engine.generate([requests[0], requests[-1]])
        assert [sample.response_ids for sample in alone] == [samples[0].response_ids, samples[-1].response_ids]

    def check_the_most_probable_tokens_come_with_the_sampled_ones(self) -> None:
        """Their log-probs at the sampling temperature, the sampled token's among them where it is not one of them."""
        requests = [Request(prompt, 7, 12, 0.7, top) for prompt, top in zip(PROMPTS, (0, 3, 5), strict=True)]
        plain, *samples = self.engine.generate(requests)
        assert plain.top_log_probs == [] and plain.log_probs
        outsiders = 0
        for request, sample in zip(requests[1:], samples, strict=True):
            with torch.no_grad():
                logits = self.model(torch.tensor([request.prompt_token_ids + sample.response_ids])).logits[0]
            start = len(request.prompt_token_ids) - 1
            expected = (logits[start:-1] / 0.7).log_softmax(-1).topk(request.top).values
            for row, found, drawn in zip(expected.tolist(), sample.top_log_probs, sample.log_probs, strict=True):
                outsiders += len(found) > request.top
                wanted = row + [drawn] * (len(found) > request.top)
                assert max(abs(a - b) for a, b in zip(wanted, found, strict=True)) < 3e-5 and drawn in found
        assert outsiders

    def check_greedy_tokens_are_those_of_transformers(self) -> None:
        """As are those of so small a top_p that it leaves the most probable one alone."""
        narrow = self.engine.generate([Request(prompt, 3, 12, 1.0, top_p=1e-6) for prompt in PROMPTS])
        for prompt, sample, near in zip(PROMPTS, self.generate(temperature=0.0), narrow, strict=True):
            with torch.no_grad():
                logits = self.model(torch.tensor([prompt + sample.response_ids])).logits[0]
            assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == sample.response_ids == near.response_ids

    def check_samples_depend_on_the_seed_alone(self) -> None:
        requests = [Request(PROMPTS[0], seed, 12, 1.0) for seed in range(8)]
        together = self.engine.generate(requests)
        assert together == self.engine.generate(requests)
        apart = [self.engine.generate([request])[0] for request in reversed(requests[2:5])]
        assert [sample.response_ids for sample in apart[::-1]] == [sample.response_ids for sample in together[2:5]]
        assert len({tuple(sample.response_ids) for sample in together}) == 8

    def check_responses_end_with_the_end_token_or_at_the_limit(self) -> None:
        flat = 2.0  # a temperature at which every token has a chance
        samples = self.engine.generate([Request(PROMPTS[1], seed, 12, flat) for seed in range(100)])
        assert {sample.finish_reason for sample in samples} == {"stop", "length"}
        for sample in samples:
            assert len(sample.log_probs) == len(sample.response_ids) <= 12
            assert END not in sample.response_ids[:-1]
            assert (sample.response_ids[-1] == END) or sample.finish_reason == "length"
            assert len(sample.response_ids) == 12 or sample.finish_reason == "stop"
        assert self.engine.generate([]) == []

    def check_generation_leaves_the_random_state_alone(self) -> None:
        before = _process_state()
        self.generate()
        assert _process_state() == before

    def check_new_weights_replace_old_ones(self) -> None:
        stale = self.generate()
        self.use_model(seed=1)
        assert self.differs_from_transformers(stale, 1.0) > 0.05  # else the next line proves nothing
        assert self.push().verified
        assert self.differs_from_transformers(self.generate(), 1.0) < 3e-5

    def spoilt(self, spoil: Callable[[], None]) -> str:
        """The error of a push during which ``spoil`` changes the engine between load and proof."""
        load = self.engine.load_weights

        def load_and_spoil(weights) -> None:
            load(weights)
            spoil()

        self.engine.load_weights = load_and_spoil
        try:
            message = raises(WeightSyncError, self.push)
        finally:
            self.engine.load_weights = load
        assert not self.engine.ready
        assert "push them first" in raises(EngineNotReady, self.generate)
        return message

    def check_a_flipped_norm_weight_is_caught(self) -> None:
        name = "model.layers.1.post_attention_layernorm.weight"
        message = self.spoilt(lambda: self.engine.held(name, slice(None))[5].add_(1e-6))
        assert f"{name} differs" in message
        assert "1 of 64" in message or "1 of 128" in message

    def check_a_flipped_kernel_weight_is_caught(self) -> None:
        """One element of one key, on the last rank alone: every rank must stop."""

        def flip() -> None:
            if self.engine.tp_rank < self.engine.tp_size - 1:
                return
            place = self.sync.plan["model.layers.2.self_attn.k_proj.weight"][0]
            module = self.engine._modules[place.parameter.removesuffix(".weight")]
            matrix = self.engine.held(place.parameter, slice(0, self.weights["model.norm.weight"].numel())).contiguous()
            matrix[place.held_rows.start, 7] *= 1 + 1e-6
            module.weight = torch.nn.Parameter(matrix, requires_grad=False)
            module.quant_method.process_weights_after_loading(module)

        message = self.spoilt(flip)
        assert f"failed on rank {self.groups.world_size - 1}" in message
        assert "self_attn.k_proj.weight differs in the engine's model.layers.2.self_attn.qkv_proj.weight" in message

    def check_a_flipped_element_of_any_column_is_caught(self) -> None:
        """Of a matrix that the engine computes with itself, though only one column's values are compared."""
        widths, weight_sync.WIDTHS = weight_sync.WIDTHS, ((math.inf, 1),)
        name = "model.embed_tokens.weight"

        def flip() -> None:
            matrix = self.engine.held(name, slice(None))
            column = (self.sync._syncs + 3) % matrix.shape[1]  # not the one that is compared
            matrix[2, column] *= -1

        try:
            message = self.spoilt(flip)
            assert f"{name} differs in the engine's {name}: 1 of " in message and "rows have other bits" in message
            report = self.push()
            # linear layers are repacked on a CPU, where one column of each is compared
            assert report.verified and (report.share < 1) == (not platform.has_gpu())
        finally:
            weight_sync.WIDTHS = widths

    def check_a_stale_head_is_caught(self) -> None:
        """What a reload does to a tied head on a CPU when nobody sends it."""
        held = self.engine.held

        def stale(parameter: str, columns: slice) -> torch.Tensor:
            return held(parameter, columns) + (1e-3 if parameter == "lm_head.weight" else 0.0)

        self.engine.held = stale
        try:
            assert "differs in the engine's lm_head.weight" in raises(WeightSyncError, self.push)
        finally:
            self.engine.held = held

    def check_missing_unknown_and_broken_weights(self) -> None:
        name = "model.layers.3.mlp.up_proj.weight"
        some = {key: tensor for key, tensor in self.weights.items() if key != name}
        assert f"sent no {name}" in raises(WeightSyncError, lambda: self.sync.push(iter(some.items())))
        more = {**self.weights, "model.layers.9.extra": torch.ones(2)}
        assert "model.layers.9.extra" in raises(WeightSyncError, lambda: self.sync.push(iter(more.items())))
        nan = {**self.weights, name: self.weights[name] * torch.nan}
        assert f"{name} differs" in (message := raises(WeightSyncError, lambda: self.sync.push(iter(nan.items()))))
        assert "holds NaN or infinity" in message
        assert not self.engine.ready

    def check_a_failed_sync_can_be_repaired(self) -> None:
        assert self.push().verified
        assert self.differs_from_transformers(self.generate(), 1.0) < 3e-5


def _process_state() -> tuple:
    return (
        torch.get_rng_state().tolist(),
        numpy.random.get_state()[1].tolist(),
        random.getstate(),
        os.environ.get("LOCAL_WORLD_SIZE"),
        os.environ.get("LD_PRELOAD"),
    )


def _segments() -> set[str]:
    """The names of shared memory that this process has mapped and that had one."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line.split("/dev/shm/")[1].removesuffix(" (deleted)") for line in lines if "/dev/shm/" in line}


def main() -> None:
    folder, family, tied, tp = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "tied", int(sys.argv[4])
    platform.start_rank()
    process_groups.init(timeout_seconds=120)
    outcome: dict[str, str] = {}
    checks = Checks(folder / "model", family, tied, tp)
    outcome["segments"] = " ".join(sorted(_segments()))
    for name in [name for name in vars(Checks) if name.startswith("check_")]:
        try:
            getattr(checks, name)()
            outcome[name] = "passed"
        except Exception:
            outcome[name] = traceback.format_exc()
        (folder / f"outcome-{checks.groups.rank}.json").write_text(json.dumps(outcome))
        if outcome[name] != "passed":
            break  # the ranks are no longer in step
    checks.engine.close()


if __name__ == "__main__":
    main()
