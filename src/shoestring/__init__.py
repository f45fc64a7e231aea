"""Shoestring: fine-tune Hugging Face Transformers in the memory you have."""

__version__ = "0.1.0"
