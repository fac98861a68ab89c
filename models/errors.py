"""What can go wrong with models. Every message says what was wrong, with the value, and what to do."""


class ModelError(Exception):
    """A model cannot be loaded, used or trained as asked."""
