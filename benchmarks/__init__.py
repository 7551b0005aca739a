"""Side-by-side runs against what else one would write."""
