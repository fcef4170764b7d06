"""One method a file, each a `MetaLearner` (`base.py`)."""
