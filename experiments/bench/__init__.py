"""How fast is decoding on this machine, against `transformers` with the same weights?"""
