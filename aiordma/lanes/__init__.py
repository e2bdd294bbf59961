"""Lanes: movers of chunks. They know slots and memory, and nothing of manifests, rounds or tensors."""
