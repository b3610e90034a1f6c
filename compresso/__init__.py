"""Compress language models: quantize, prune and measure them."""

__version__ = "0.1.0"
