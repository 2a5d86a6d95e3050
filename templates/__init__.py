"""Package data only."""
