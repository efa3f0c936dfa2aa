"""A Megatron model with its gradients, optimizer and schedule: what policy and critic share."""

from __future__ import annotations

import math

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_rlvr import platform
from megatron_rlvr.architecture import Architecture
from megatron_rlvr.config import Config, OptimizerConfig
from megatron_rlvr.distributed.groups import ParallelGroups
from megatron_rlvr.distributed.reduce import reduce_meter
from megatron_rlvr.metrics import Meter
from megatron_rlvr.models import schedule
from megatron_rlvr.models.build import DTYPES
from megatron_rlvr.types import Microbatch


class TrainingDiverged(RuntimeError):
    """A gradient that is not a number: going on would destroy the model."""


class Trainable:
    """DDP over the data- and context-parallel ranks, AdamW (sharded over them when distributed), warm-up and decay.

    ``steps`` are those of the run in which this model learns; ``section`` is where the config holds ``settings``.
    """

    name = "policy"  # of its metrics
    section = "optimizer"
    signs = "policy/grad_norm or policy/ratio_max"  # metrics that grow before it diverges
    architecture: Architecture
    groups: ParallelGroups
    path: str  # the Hugging Face folder that it started from

    def __init__(self, config: Config, settings: OptimizerConfig, chunks: list[GPTModel], steps: int) -> None:
        self.chunks = chunks
        with platform.megatron_calls():
            ddp = DistributedDataParallelConfig(
                grad_reduce_in_fp32=True, use_distributed_optimizer=settings.distributed, check_for_nan_in_grad=False
            )
            self.replicas = [
                DistributedDataParallel(chunk.config, ddp, chunk, disable_bucketing=index > 0)
                for index, chunk in enumerate(chunks)
            ]
            self.optimizer = self._build_optimizer(config, settings)
            self.scheduler = self._build_scheduler(settings, steps * config.trainer.updates_per_rollout)
        for chunk in chunks:
            chunk.config.finalize_model_grads_func = schedule.sum_gradients
            chunk.config.grad_scale_func = self.optimizer.scale_loss

    def _build_optimizer(self, config: Config, settings: OptimizerConfig):
        dtype = DTYPES[config.model.dtype]
        options = MegatronOptimizerConfig(
            optimizer="adam",
            lr=settings.lr,
            min_lr=settings.min_lr,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.betas[0],
            adam_beta2=settings.betas[1],
            adam_eps=settings.eps,
            clip_grad=settings.clip_grad,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=settings.distributed,
        )
        # Without the overrides, and without the scheduler that multiplies them in, norms and biases decay too.
        return get_megatron_optimizer(options, self.replicas, config_overrides=get_standard_config_overrides(options))

    def _build_scheduler(self, settings: OptimizerConfig, updates: int) -> OptimizerParamScheduler:
        return OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=settings.lr,
            min_lr=settings.min_lr,
            lr_warmup_steps=settings.warmup_steps,
            lr_decay_steps=max(updates, settings.warmup_steps) + 1,  # so that the last update trains too
            lr_decay_style=settings.schedule,
            start_wd=settings.weight_decay,
            end_wd=settings.weight_decay,
            wd_incr_steps=0,
            wd_incr_style="constant",
        )

    def train_step(self, microbatches: list[Microbatch], loss: schedule.Consumer, meter: Meter) -> Meter:
        """Forward, backward and one optimizer update over these microbatches. Raises TrainingDiverged.

        Returns the data-parallel ranks' meters as one, equal on every rank, with NAME/loss, NAME/grad_norm and NAME/lr.
        """
        with platform.megatron_calls():
            for replica in self.replicas:
                replica.train()
                replica.zero_grad_buffer()
            self.optimizer.zero_grad()
            losses = schedule.forward_backward(self.replicas, microbatches, loss, self.groups.cp)
            self.scheduler.step(1)  # before the update, so that the first one of a warm-up already moves
            updated, grad_norm, _ = self.optimizer.step()
        if not updated or not math.isfinite(grad_norm):
            raise TrainingDiverged(
                f"the gradient norm is {grad_norm}: see in metrics.jsonl from where {self.signs} grew, and lower "
                f"{self.section}.lr or the clips"
            )
        if self.groups.is_last_stage:
            # Shares of one global loss: their sum over microbatches and ranks is the loss itself.
            meter.add(f"{self.name}/loss", torch.stack(losses).sum(), 1 / self.groups.dp_size)
        meter = reduce_meter(meter, self.groups)
        meter.add(f"{self.name}/grad_norm", float(grad_norm))
        meter.add(f"{self.name}/lr", self.optimizer.param_groups[0]["lr"])
        return meter

    def forward(self, microbatches: list[Microbatch], consume: schedule.Consumer) -> list:
        """A pass without gradients or dropout; on the last stage what ``consume`` makes of each microbatch."""
        for replica in self.replicas:
            replica.eval()
        return schedule.forward(self.replicas, microbatches, consume, self.groups.cp)
