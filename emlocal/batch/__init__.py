"""Batches: read a JSONL file of prompts and write a JSONL file of answers that survives a kill.

- `lines`: parses input lines and builds output rows
- `run`: answers the lines with a method
- `journal`: the output file; it appends each row whole or not at all
- `output`: the manifest and the locks beside the output, and the rows that the output already holds
- `keys`: sets of strings on disk, of any size, in constant memory
"""
