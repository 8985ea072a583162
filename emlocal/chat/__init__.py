"""Conversations with a model: their state, their commands, and how they look in a terminal or a pipe."""
