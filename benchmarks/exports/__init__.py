"""What exports cost beside the ways that others have."""
