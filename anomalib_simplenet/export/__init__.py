"""Exported models that answer like their checkpoints."""
