"""Tokenised rows: made, counted, cached."""
