"""The plugins are distributions of their own; their tests that need torch alone run here."""

import sys
from pathlib import Path

INTEGRATIONS = Path(__file__).parents[2] / "integrations"
sys.path[:0] = [str(INTEGRATIONS / "vllm")]
