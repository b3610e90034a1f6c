"""Choose new codes together with corrections."""


def requantize():
    """x"""
