"""A whole RL loop, small enough for one CPU core: slime, Megatron and Ray are real; see loop.py."""
