"""What models are asked, and how it is told whether they are right.

- `task`: what a task is, and rows of JSONL, JSON, gzip or the hub; `open` makes one of a name and a file
- `mathematics`: questions with an answer: GSM8K, MATH-500, and files of their kind
- `programs`: HumanEval and its kind: a function, and tests that it must pass
- `scicode`: problems in steps, each built on the code of those before; `scicode_h5` reads official targets,
  `scicode_targets` (computed targets) and `scicode_official` run in the sandbox
"""
