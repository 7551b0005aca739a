"""Techniques, one file each: the formula, and the step or form that applies it."""
