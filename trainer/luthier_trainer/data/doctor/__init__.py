"""What is worth knowing about rows without a model."""
