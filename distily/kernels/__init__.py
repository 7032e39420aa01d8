"""Triton kernels of the fused loss. Importing a module here needs triton; the core does so on a GPU only."""
