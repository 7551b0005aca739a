"""Records, the table, and the figures: from records alone, without torch."""
