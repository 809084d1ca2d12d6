"""Training data: files to rows, rows to conversations, conversations to tokens. Importing this loads nothing else."""
