"""Questions, from a source to checked examples.

Where a question comes from (a file, the hub, the sample, generated ones): `sources`. How JSON, JSONL, CSV and Parquet
files are read, and where another format goes: `formats`. What makes a record invalid, and what is mended: `checking`.
`records` defines the words that the whole package uses; `sample` holds the embedded and the generated examples.
"""
