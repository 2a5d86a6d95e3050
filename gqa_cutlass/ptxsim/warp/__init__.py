"""Instructions of a warp: lanes exchange values, or multiply matrices together."""
