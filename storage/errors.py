"""What can go wrong with stored bytes. Every message says what was wrong, with the value, and what to do."""


class StorageError(Exception):
    """The store cannot do what was asked: unreachable, refused, full, or without atomic creates."""


class NotFound(StorageError):
    """There is no object under that key."""


class Damaged(StorageError):
    """Stored bytes differ from their digest. They were set aside; running again remakes them."""


class ColumnBroken(Exception):
    """A file is no Parquet or Arrow file, is damaged, or has no column of images."""


class DataError(Exception):
    """The user's data is unusable as a whole (one bad image is quarantined instead)."""
