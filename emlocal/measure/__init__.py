"""Measuring: interleaved pairs of equal work, their ratios, and what `emlocal bench` reports.

Machines are shared and clocks wander, so nothing is compared across runs: what is compared runs side by
side in one process, in alternating order, and the median over the pairs of their ratios is the answer.
"""
