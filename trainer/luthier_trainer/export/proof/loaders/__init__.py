"""What will load an export, each by its own way in."""
