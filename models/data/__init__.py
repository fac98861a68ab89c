"""Data that ships with the models, each beside the script that makes it."""
