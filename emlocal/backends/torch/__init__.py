"""The torch engine: CUDA, and any CPU. Generates and trains."""
