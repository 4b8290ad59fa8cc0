"""One query row a sequence attends to its k best keys: exact Top-k decoding."""
