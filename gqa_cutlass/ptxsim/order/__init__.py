"""What is ordered before what: barriers, atomics, and the accesses that nothing orders."""
