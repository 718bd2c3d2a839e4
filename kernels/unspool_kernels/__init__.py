"""Recurrent and windowed sequence kernels: tensors in, tensors out. Knows no model, no configuration, no HTTP."""
