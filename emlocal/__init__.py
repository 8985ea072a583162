"""emlocal: entropy minimization for language models on people's own machines (arXiv 2505.15134)."""

__version__ = "0.1.0"
