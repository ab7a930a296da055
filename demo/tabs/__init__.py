"""The tabs of the app, one module each, with helpers that render their HTML."""
