"""Studies: each folder asks one question, with its command, its hardware and its committed result."""
