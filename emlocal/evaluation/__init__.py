"""Honest comparisons: tasks, judging, statistics and reports for `emlocal eval`."""
