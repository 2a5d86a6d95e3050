"""What was measured to be fastest: candidates, their measuring, and the tables that come of it."""
