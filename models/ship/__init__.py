"""An adapted model as a folder: written, read again, and in the formats of others."""
