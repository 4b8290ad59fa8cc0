"""The lightning indexer: a cheap learned score for each query and key, and the k best keys by it."""
