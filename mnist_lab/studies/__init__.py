"""Questions asked of many rows."""
