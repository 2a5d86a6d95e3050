"""Memory: its bytes and bounds, accesses to it, and asynchronous copies."""
