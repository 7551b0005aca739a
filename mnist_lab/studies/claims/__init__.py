"""What reports on this subject claim, and the tests that settle it. From records alone, no torch."""
