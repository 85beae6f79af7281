"""Triton's interpreter, three times as fast: without what it works out at each operation and throws away, or knows.

It is Triton's own code that runs (3.6 to 3.8); where another version has other names it is left as it is, and slower.
"""


def quicken() -> None:
    try:
        import triton.language as tl
        from triton.runtime import interpreter as it

        options = it.interpreter_builder.options
        scope, patch, np_dtype, call = it._LangPatchScope, it._patch_lang, it._get_np_dtype, it.GridExecutor.__call__
    except (ImportError, AttributeError):
        return
    # Each sum of integers is made again in 64 bits, to assert that it did not overflow; without `debug` nobody asserts.
    if not options.debug:
        object.__setattr__(options, "sanitize_overflow", False)  # a frozen dataclass

    known = {}

    def np_dtype_of(ty):
        if type(ty.scalar) is not tl.dtype:  # pointers
            return np_dtype(ty)
        name = ty.scalar.name
        if name not in known:
            known[name] = np_dtype(ty)
        return known[name]

    # A function that a kernel calls has triton.language patched anew in each call; once a launch is enough, as only the
    # launch's own patches are taken back.
    patched = set()

    def patch_once(fn):
        if id(fn.__globals__) in patched:
            return scope()
        patched.add(id(fn.__globals__))
        return patch(fn)

    def launch(self, *args, **kwargs):
        patched.clear()
        return call(self, *args, **kwargs)

    it._get_np_dtype, it._patch_lang, it.GridExecutor.__call__ = np_dtype_of, patch_once, launch
