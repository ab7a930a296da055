"""Reads images of every supported kind."""
