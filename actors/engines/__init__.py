"""Engines: the protocol, transformers and vLLM."""
