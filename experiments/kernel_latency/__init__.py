"""How close are the kernels to the memory's limit, and to what other libraries reach on the same inputs?"""
