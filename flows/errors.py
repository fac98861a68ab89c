"""Mistakes in how something was called, beside those in what it was given."""

from latteflow.tasks.core.errors import ConfigError


class UsageError(ConfigError):
    """The command line itself is wrong: an option's value, or options that do not go together. Exit status 2."""
