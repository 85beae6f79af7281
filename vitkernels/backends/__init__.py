"""One function, `patch_embed`, in three ways. A backend is a module or a package with the same four names:

    why_not(p) -> list[str]                   every reason why it can't take problem p; none: it can
    how(p) -> str                             what it would do, for people
    forward(p, *tensors) -> tokens            [B, T+N, D]
    backward(p, grad, *tensors, grads=...)    writes those of the five gradients that are asked for

`tensors` are images, weight, bias, pos_embed, prefix and keep, as `canonical` brings them to one form.
"""
