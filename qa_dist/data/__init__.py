"""Questions, from a source to checked examples.

Where a question comes from (a file, a folder, the hub, the sample, generated ones): `sources`, `folders`. How JSON,
JSONL, CSV and Parquet are read, and where another format goes: `formats`. How questions are laid out in what was read:
`layouts`, `rows`, and single values in `values`, `literals`. What makes a record invalid: `checking`; where an answer
stands, and what is mended: `placing`. `records` defines the words that the whole package uses; `sample` holds the
embedded and the generated examples.
"""
