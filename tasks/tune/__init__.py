"""Models: what is checked before, `tune`, which trains them, and `select`, which says whom to trust."""
