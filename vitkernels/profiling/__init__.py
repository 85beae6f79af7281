"""What a launch does: traces, hardware counters, and the machine code of the kernels."""
