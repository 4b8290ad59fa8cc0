"""Every query row attends to its k best keys: Top-k attention for training, scoring and prefill."""
