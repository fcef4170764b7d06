"""Names inside a run folder, for readers that need neither torch nor Lightning."""

CONFIG_FILE = "config.yaml"
OVERRIDES_FILE = "overrides.yaml"
EVALUATIONS_FOLDER = "evaluations"
