"""Pretraining of RoBERTa-class encoders with DeepSpeed: raw text in, a Hugging Face checkpoint out."""

__version__ = "0.1.0"
