"""Implementations of the scan, one module each; `dispatch` chooses."""
