"""RL with verifiable rewards: Megatron-core policies, vLLM rollouts."""

__version__ = "0.1.0"
