"""The settings of a run beside its groups (steps, val_every, seed, ...), checked without Lightning or torch."""

from omegaconf import DictConfig

from lightning_ntk.errors import ConfigError, check_at_least

SCHEDULES = ("constant", "cosine")


def check_top_level(config: DictConfig) -> None:
    """Raise `ConfigError` for settings beside the groups that are of another type or out of range."""
    for key in ("steps", "val_every"):
        check_at_least(1, config[key], key)
    # As far as numpy's global generator takes it.
    if isinstance(config.seed, bool) or not isinstance(config.seed, int) or not 0 <= config.seed < 2**32:
        raise ConfigError(f"seed must be a whole number from 0 to {2**32 - 1}, but got {config.seed!r}.")
    if not isinstance(config.test, bool):
        raise ConfigError(f"test must be true or false, but got {config.test!r}.")
    if config.test_checkpoint not in ("best", "last"):
        raise ConfigError(f"test_checkpoint must be 'best' or 'last', but got {config.test_checkpoint!r}.")
    if config.lr_schedule not in SCHEDULES:
        raise ConfigError(f"lr_schedule must be one of {', '.join(SCHEDULES)}, but got {config.lr_schedule!r}.")


def check_steps(config: DictConfig) -> None:
    """Raise `ConfigError` for step counts that make no whole number of meta-epochs."""
    if config.steps % config.val_every:
        below = [d for d in range(1, min(config.val_every, config.steps + 1)) if config.steps % d == 0][-1]
        steps = config.steps // config.val_every * config.val_every
        raise ConfigError(
            f"steps={config.steps} is no multiple of val_every={config.val_every}: use val_every={below}"
            f"{f', or steps={steps}' if steps else ''}."
        )
    if config.data.get("steps_per_epoch") not in (None, config.val_every):
        raise ConfigError(
            f"data.steps_per_epoch={config.data.steps_per_epoch} differs from val_every={config.val_every}, which it "
            "must follow (steps_per_epoch: ${val_every} in the YAML of a data set). Set val_every."
        )
