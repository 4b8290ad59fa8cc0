"""Models: decoder language models."""
