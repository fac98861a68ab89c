"""What is wrong with what somebody asked for."""


class ConfigError(Exception):
    """The domain file or an option is wrong; of a file, the message lists every mistake with its line."""
