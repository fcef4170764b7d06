"""Where a run's numbers and pictures go: metrics.csv and Weights & Biases."""
