"""sftkit: from a file of prompts to a better model, with a receipt for every row."""

__version__ = "0.1.0"
