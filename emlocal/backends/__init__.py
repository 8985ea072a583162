"""The engines, one folder each. To add one, add a folder and a line in this table (docs/extending.md)."""

FOLDERS = {
    "mlx": "mlx",
    "torch": "torch",
    "llama.cpp": "llama_cpp",
}
"""Engine name → folder. By default, the first that suits machine and model runs; the last suits always."""
ENGINES = tuple(sorted(FOLDERS))
"""The names of the engines."""
