"""Domains: one YAML each, and the preparers that write the images the YAML files point to."""
