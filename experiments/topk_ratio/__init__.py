"""What exact Top-k decoding costs on long-context tasks, by the share and the number of keys kept."""
