"""The engines, a folder each. A new one is a folder and a line in this table (docs/extending.md)."""

FOLDERS = {
    "mlx": "mlx",
    "torch": "torch",
    "llama.cpp": "llama_cpp",
}
"""Name → folder. Where nobody says, the first that suits machine and model runs; the last always suits."""
ENGINES = tuple(sorted(FOLDERS))
"""Their names."""
