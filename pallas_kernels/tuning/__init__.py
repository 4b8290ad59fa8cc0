"""Search of block sizes: `python -m pallas_kernels.tuning` times candidates on this device and writes `tuned/<device>/<op>.json`."""
