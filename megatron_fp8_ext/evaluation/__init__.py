"""Evaluation through evalscope: a served checkpoint on AIME, GPQA and LiveCodeBench, unattended."""
