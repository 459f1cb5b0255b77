"""Launchers: they start dalle_jax.train on many processes, and know nothing else of it.

Standard library only and no jax: they start at once, on machines that have neither.
"""
