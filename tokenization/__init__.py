"""Steps 1 and 2: parquet text to token chunks, and chunks to one dataset."""
