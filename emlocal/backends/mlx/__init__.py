"""The MLX engine: Apple Silicon, and on Linux the CPU, where it is tested. Generates."""
