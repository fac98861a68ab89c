"""CLIP and whatever stands in for it: pictures and words in, features out."""
