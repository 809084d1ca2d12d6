"""luthierd: keeps fine-tuning jobs, drives trainers, and streams their progress."""

__version__ = "0.1.0"
