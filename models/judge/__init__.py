"""Which model to trust and how far: figures of merit, and what can be told without labels."""
