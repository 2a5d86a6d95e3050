"""Times decode steps against their baselines and a read-only roofline: `gqa-cutlass bench`."""
