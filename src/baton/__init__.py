"""Baton: disaggregated prefill/decode serving. The rooms are linked here from the repository root."""

__version__ = "0.1.0"
