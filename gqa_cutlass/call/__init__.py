"""A call: its tensors checked, its options, its plan, and the line of the log."""
