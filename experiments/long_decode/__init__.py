"""Study: tokens per second at long contexts, with full, exact Top-k and indexer attention, on whole models."""
