"""Measuring: the machine that figures come from, pairs of timings, and what `emlocal bench` measures."""
