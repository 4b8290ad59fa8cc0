"""Decoding: the key/value cache, compiled loops over tokens, sampling, and text in, text out."""
