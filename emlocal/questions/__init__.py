"""Question files, for batch, finetune, rl and eval alike.

- `files`: rows of JSON, CSV, TSV and parquet files, and lines of JSONL; gzip is unpacked on the way
- `asked`: the question in a row: its messages and its answer, under the names that data sets give them
"""
