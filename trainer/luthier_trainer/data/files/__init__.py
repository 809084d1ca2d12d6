"""Dataset files of every kind, as rows."""
