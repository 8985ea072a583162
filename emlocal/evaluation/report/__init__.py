"""Reports of an evaluation: results.json, Markdown, and HTML with figures.

- `document`: the content of a report with its provenance, and its JSON
- `texts`: numbers as people read them; the Markdown page
- `page`: the self-contained HTML page and its figures: accuracy against cost, entropy along the answer, and
  risk against coverage
"""
