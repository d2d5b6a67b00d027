"""Triton kernels, one file per idea; each wrapper takes tensors of any strides and returns contiguous ones.

Who calls what: `optimized.ops` registers the wrappers with PyTorch, with fakes and gradients. Every kernel loads in the
tensor's dtype and converts before any arithmetic (the interpreter's bfloat16 arithmetic is wrong), passes `other` to
every masked load, addresses in int64, and lets each element be written by one program: no atomics, always the same
bits.

Sizes are not specialised (`do_not_specialize`), so that another length compiles nothing new; block sizes are.
"""
