"""Episodic data: `base.py` holds the whole contract for a new data set, then one file a data set."""
