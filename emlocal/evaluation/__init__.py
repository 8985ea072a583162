"""Comparisons of decoding methods: tasks, judging, statistics and reports for `emlocal eval`."""
