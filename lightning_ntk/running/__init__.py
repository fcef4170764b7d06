"""What carries a run: its folder, trainer, checkpoints, results, and the cluster it is a job of."""
