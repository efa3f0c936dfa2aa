"""The policy and the critic: Megatron-core models, their schedule, and their checkpoints."""
