"""Where jobs run: one launcher a file, over the same two calls (base.py)."""
