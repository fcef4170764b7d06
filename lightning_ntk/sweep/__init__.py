"""`lightning-ntk sweep`: many runs of `train`, each in a process of its own."""
