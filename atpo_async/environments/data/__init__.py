"""The rows that tasks are made of: JSONL, parquet and Hugging Face data sets."""
