"""Rollouts: the vLLM engine, and what its samples become."""
