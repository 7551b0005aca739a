"""What the scripts share on the command line."""
