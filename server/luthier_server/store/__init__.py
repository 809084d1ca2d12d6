"""What is durable: one SQLite database, written by one task."""
