"""How a row of the table comes to be."""
