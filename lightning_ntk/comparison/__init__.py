"""Runs side by side: tables, figures, the page, the W&B dashboard."""
