"""EM-FT: fine-tune a LoRA adapter on the entropy of the model's own, unlabelled output."""
