"""What a kernel is made of and where its time goes: traces, Nsight Compute, machine code."""
