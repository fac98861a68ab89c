"""Texts of language models: who writes them, what is asked, and what is wrong with an answer."""
