"""The search for the fastest tiles of the Triton kernels on a GPU: what to try, in what order, and what is kept."""
