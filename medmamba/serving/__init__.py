"""Answers to programs: the records of the app's API, and a server that classifies many requests in one batch."""

from .record import classification
from .server import build_server, serve

__all__ = ["build_server", "classification", "serve"]
