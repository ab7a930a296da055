"""Helpers shared by the whole package; they import nothing else of it."""
