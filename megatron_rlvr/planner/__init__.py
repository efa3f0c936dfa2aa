"""What a run will need before anything starts, from its config and its model's shape alone: no torch, no GPU."""
