"""Element-wise instructions: each works on every lane by itself."""
