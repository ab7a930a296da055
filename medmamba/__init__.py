"""MedMamba."""
