"""The settings of a command: composed from conf/ and overrides, checked, built into objects."""
