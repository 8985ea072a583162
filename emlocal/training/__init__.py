"""Training of a LoRA adapter on unlabelled prompts: EM-FT, EM-RL and vote distillation."""
