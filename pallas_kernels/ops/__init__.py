"""One folder an op: api, reference, xla and the Mosaic kernels; public names live in `pallas_kernels`."""
