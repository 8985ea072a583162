"""JSONL in and out: a file of prompts becomes a file of completions that survives being killed.

- `journal`: the output file, to which rows are appended whole or not at all
- `existing`: what an output already holds when a run begins, and whether it may go on
- `manifest`: the file beside it that says which run it belongs to, and that only one process writes it
- `keys`: a set of strings of any size in flat memory
"""
