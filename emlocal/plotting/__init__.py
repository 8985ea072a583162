"""Figures: how training runs went."""
