"""LoRA adapters: reading, checking, writing and converting them."""
