"""From a Hugging Face shape to Megatron model chunks: GPTModel with the Transformer Engine spec, or the local one."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from megatron_rlvr import platform
from megatron_rlvr.architecture import Architecture
from megatron_rlvr.config import Config
from megatron_rlvr.distributed.groups import ParallelGroups
from megatron_rlvr.models.attention import PackedAttention, RMSNorm, rotary_frequencies

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def initialize_parallel(config: Config) -> ParallelGroups:
    """Megatron's process groups and dropout streams for tp x cp x pp x dp; the default group must exist."""
    parallel = config.parallel
    with platform.megatron_calls():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tp,
            pipeline_model_parallel_size=parallel.pp,
            virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
            context_parallel_size=parallel.cp,
            distributed_timeout_minutes=math.ceil(config.run.collective_timeout / 60),
        )
        groups = ParallelGroups.from_megatron()
        # Layers of different stages, replicas, and stretches of tokens drop with masks of their own; Megatron tells tp
        # ranks apart itself.
        stream = (groups.pp_rank * groups.dp_size + groups.dp_rank) * groups.cp_size + groups.cp_rank
        model_parallel_cuda_manual_seed(config.seed + 10_000 * stream)
    return groups


def transformer_config(config: Config, architecture: Architecture) -> TransformerConfig:
    """The architecture and the layout in Megatron's terms."""
    parallel, dtype = config.parallel, DTYPES[config.model.dtype]
    recompute = None if config.model.recompute == "none" else config.model.recompute
    return TransformerConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        num_attention_heads=architecture.num_heads,
        num_query_groups=architecture.num_kv_heads,
        kv_channels=architecture.head_dim,
        ffn_hidden_size=architecture.ffn_size,
        normalization="RMSNorm",
        layernorm_epsilon=architecture.rms_eps,
        qk_layernorm=architecture.qk_norm,
        add_qkv_bias=architecture.qkv_bias,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        attention_dropout=config.model.dropout,
        hidden_dropout=config.model.dropout,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
        sequence_parallel=parallel.sequence_parallel,
        # Microbatches differ in length, which Megatron refuses with the default dispatcher even without experts
        # (transformer_config.py:1829), and which needs one send at a time when stages interleave. Experts, which are
        # evaluated one microbatch at a time, take that dispatcher: it alone asks nothing of CUDA.
        variable_seq_lengths=architecture.experts is None,
        moe_token_dispatcher_type="alltoall" if architecture.experts is None else "allgather",
        batch_p2p_comm=False,
        overlap_p2p_comm=parallel.vpp > 1,
        use_cpu_initialization=not platform.has_gpu(),
        **_experts(architecture),
        # With Transformer Engine too: the output layer is Megatron's own, which knows no kernel but apex's.
        gradient_accumulation_fusion=platform.has_apex_weight_gradient_kernel(),
        bias_activation_fusion=platform.has_gpu(),  # else an MLP keeps two matrices more for its backward
        apply_rope_fusion=platform.has_transformer_engine(),
        masked_softmax_fusion=False,
        # The losses divide by their own global denominators: gradients are summed, never averaged.
        calculate_per_token_loss=True,
        recompute_granularity=recompute,
        recompute_method="uniform" if recompute == "full" else None,
        recompute_num_layers=1 if recompute == "full" else None,
    )


def _experts(architecture: Architecture) -> dict[str, object]:
    """Megatron's terms for a mixture of experts: softmax over those chosen is the normalised softmax over all."""
    experts = architecture.experts
    if experts is None:
        return {}
    platform.name_missing_expert_kernel()
    return {
        "num_moe_experts": experts.count,
        "moe_ffn_hidden_size": experts.ffn_size,
        "moe_router_topk": experts.per_token,
        "moe_router_pre_softmax": not experts.normalised,
        "moe_router_load_balancing_type": "none",
    }


@functools.cache
def _log_spec_once(name: str) -> None:
    log.info("layer spec: %s", name)


def layer_spec(
    config: TransformerConfig, architecture: Architecture, vp_stage: int | None, cp: int
) -> ModuleSpec | TransformerBlockSubmodules:
    """The one place that chooses between Transformer Engine's layers and the local ones."""
    core = ModuleSpec(
        PackedAttention, params={"rotary_base": architecture.rope_theta, "rope_scaling": architecture.rope_scaling}
    )
    if platform.has_transformer_engine():
        spec = get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts, qk_layernorm=architecture.qk_norm
        )
        if own := own_attention(cp, config.params_dtype):
            spec.submodules.self_attention.submodules.core_attention = core
        why = "parallel.cp" if cp > 1 else "Transformer Engine has none for packed responses here"
        _log_spec_once("Transformer Engine" + f", core attention: local ({why})" * own)
        return spec
    _log_spec_once("local (no Transformer Engine on this machine)")
    spec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, qk_layernorm=architecture.qk_norm, normalization="RMSNorm"
    )
    layer = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    attention = layer.self_attention.submodules
    attention.core_attention = core
    if architecture.qk_norm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[spec] * layers, layer_norm=RMSNorm)


def own_attention(cp: int, dtype: torch.dtype) -> bool:
    """Whether attention is models/attention.py's: Transformer Engine's cuts tokens for cp in a way of its own."""
    return cp > 1 or not platform.has_packed_attention(dtype)


def build_chunks(config: Config, architecture: Architecture, groups: ParallelGroups) -> list[GPTModel]:
    """This rank's model chunks, one per virtual stage, on its device; the weights are still to be loaded."""
    with platform.megatron_calls():
        megatron = transformer_config(config, architecture)
        return [_build_chunk(config, architecture, groups, megatron, stage) for stage in range(config.parallel.vpp)]


def _build_chunk(
    config: Config, architecture: Architecture, groups: ParallelGroups, megatron: TransformerConfig, stage: int
) -> GPTModel:
    vp_stage = stage if config.parallel.vpp > 1 else None
    # Queries and keys are rotated by Megatron before the attention, or by that itself.
    rotates = not own_attention(config.parallel.cp, megatron.params_dtype)
    chunk = GPTModel(
        config=megatron,
        transformer_layer_spec=layer_spec(megatron, architecture, vp_stage, config.parallel.cp),
        vocab_size=architecture.padded_vocab(groups.tp_size),
        max_sequence_length=architecture.max_positions,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        parallel_output=True,
        share_embeddings_and_output_weights=architecture.tied,
        position_embedding_type="rope" if rotates else "none",
        rotary_base=architecture.rope_theta,
        vp_stage=vp_stage,
    )
    if architecture.rope_scaling and rotates:  # Megatron's own takes the factor alone
        chunk.rotary_pos_emb.inv_freq = rotary_frequencies(
            architecture.head_dim, architecture.rope_theta, architecture.rope_scaling, platform.device()
        )
    return chunk.to(platform.device())


def leave_out_output_layer(chunk: GPTModel) -> None:
    """Let the chunk give the hidden states [t, 1, H] that its output layer, if it has one, would have multiplied.

    The layer and its weight stay where checkpoints and weight sync look for them. GPTModel of megatron-core 0.16.1 has
    no hook between its last norm and the logits (gpt_model.py:685).
    """
    if chunk.post_process:
        chunk.output_layer.forward = lambda hidden, weight=None, runtime_gather_output=None: (hidden, None)


@contextmanager
def without_output_layer(chunk: GPTModel) -> Iterator[None]:
    """The chunk gives hidden states for as long as this is open."""
    forward = chunk.output_layer.forward if chunk.post_process else None
    leave_out_output_layer(chunk)
    try:
        yield
    finally:
        if chunk.post_process:
            chunk.output_layer.forward = forward


def output_weight(chunk: GPTModel) -> torch.Tensor:
    """[V/tp, H] of the last chunk: the embedding's, where a tied model has both of its ends in that chunk."""
    weight = chunk.output_layer.weight
    return chunk.embedding.word_embeddings.weight if weight is None else weight
