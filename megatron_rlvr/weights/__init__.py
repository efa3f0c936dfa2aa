"""Weights: from Megatron shards to Hugging Face names, and on into the engine."""
