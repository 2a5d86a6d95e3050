"""What a program and its launch may ask for: an odd text gets an error, not the host's memory.

Several times what the largest kernels here take, and no less than PTX promises or a GPU has.
"""

from __future__ import annotations

# The text. The largest kernel here has 41,000 tokens, 5,900 registers and 4,200 instructions.
TOKENS = 1 << 20
NAME = 1024  # characters; PTX ISA 4.4 asks for as many
REGISTERS = 1 << 16
INSTRUCTIONS = 1 << 16
# Registers that are used, times instructions: bits of each table that follows values through the
# code, of which there are four.
FLOW = 1 << 30
LOOPS = 64  # within one another, which is how often such a table is gone through
BRACES = 64  # within one another
OPERANDS = 32
ITEMS = 256  # between braces
OFFSETS = 1 << 63  # of an address
DIMENSIONS = 3  # of a directive such as .maxntid

# Memory of a block and of a thread, in bytes, as on compute capability 9.0.
SHARED = 227 * 1024
LOCAL = 512 * 1024
PARAMS = 32_764

# The launch, as on compute capability 9.0.
THREADS = 1024
CLUSTER = 16
GRID = ((1 << 31) - 1, 65_535, 65_535)

# Blocks that run together take up to so many bytes: registers, local and shared memory, and who
# touched it. A cluster runs together or not at all.
TOGETHER = 4 << 30
