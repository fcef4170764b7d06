"""Names inside a run folder, for readers that need neither torch nor Lightning."""

CONFIG_FILE = "config.yaml"
OVERRIDES_FILE = "overrides.yaml"
EVALUATIONS_FOLDER = "evaluations"

# Set by the first process of a multi-process run for those that it starts.
RUN_FOLDER_VARIABLE = "LIGHTNING_NTK_RUN_FOLDER"
