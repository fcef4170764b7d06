"""What observes a run: one callback a file."""
