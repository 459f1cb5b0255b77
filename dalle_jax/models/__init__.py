"""The models: arrays in, arrays out. A model is a module found by name; see context.py."""
