"""A call, in two phases.

`layout`: what its tensors say but for their addresses becomes a problem, once per layout, for
which dispatch chooses a kernel. `addresses`: where they lie becomes the kernel's argument, once per
set of addresses. A `plan` keeps both and launches; `plans` keeps the plans.
"""
