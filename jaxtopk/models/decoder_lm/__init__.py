"""Decoder language models of the Llama family.

The model itself is imported from `modeling`, not from here: the cache of `jaxtopk.decoding` needs the configuration, and the
model needs the cache.
"""

from jaxtopk.models.decoder_lm.config import DecoderConfig as DecoderConfig
