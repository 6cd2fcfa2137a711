"""gristmill: raw text to a language model, one command per stage."""

__version__ = "0.1.0.dev0"
