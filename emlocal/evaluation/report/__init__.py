"""An evaluation for people and programs: results.json, Markdown, HTML with figures.

- `document`: everything that there is to report, what it was made with, and its JSON
- `texts`: numbers as people read them; the Markdown page
- `page`: the HTML page, which needs nothing beside itself, and its figures: accuracy against cost, entropy
  along the answer
"""
