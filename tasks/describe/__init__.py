"""Texts: about images, classes, groups and pairs, each written once, and `screen`, which weighs them."""
