"""Texts and token batches that calibration and evaluation run on."""
