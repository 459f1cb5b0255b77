"""Metrics: how good pictures are."""
