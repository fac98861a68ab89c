"""CLAMP: a language model as the text tower of a CLIP (docs/methods.md)."""
