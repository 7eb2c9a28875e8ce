"""The HTTP front end of Tersor and the contract that it shares with the worker. Nothing in here imports torch."""

__version__ = "0.1.0"
