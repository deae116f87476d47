"""What netlab costs, against the kernel's floor and against others that do the same work.

Each figure is taken in turns with what it is compared to, in one run.  `make bench` runs them;
docs/benchmarks.md says what they mean.
"""
