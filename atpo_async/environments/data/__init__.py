"""Rows of data as tasks: files and Hugging Face data sets, their columns, their order and their held-out part."""
