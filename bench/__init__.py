"""Times decode steps against their peers and a read-only floor: `gqa-cutlass bench`."""
