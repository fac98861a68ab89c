"""CLAMP: a language model as the text tower of a CLIP (docs/methods.md)."""

from models.clamp.tower import ClampTower

__all__ = ["ClampTower"]
