"""Starting ranks: on this machine, or as jobs on a cluster."""
