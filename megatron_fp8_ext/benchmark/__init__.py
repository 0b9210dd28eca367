"""Measurements: each kernel beside the limit of the machine, measured in the same run."""
