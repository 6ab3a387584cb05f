"""Triton's interpreter in 6 seconds of 10: what each call of a function inside a kernel does over again.

It looks through all of triton.language for what to replace, which the kernel's launch did, and after that the
first call from a module that sees triton.language.core alone.
"""

from functools import cache

try:
    from triton import language as tl
    from triton.runtime import interpreter
except ImportError:  # no backend needs it
    interpreter = None

REPLACED: set[int] = set()  # modules, since the launch


@cache
def languages(fn) -> frozenset[int]:
    """Those that a function sees; they are what is looked through for it."""
    return frozenset(id(x) for x in fn.__globals__.values() if x is tl or x is tl.core)


def launched(self, *arguments, **named):
    REPLACED.clear()
    REPLACED.update(languages(self.fn))
    return whole(self, *arguments, **named)


def called(self, *arguments, **named):
    if not languages(self.fn) <= REPLACED:
        interpreter._patch_lang(self.fn)
        REPLACED.update(languages(self.fn))
    try:
        return self.rewrite()(*arguments, **named)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error


if interpreter:
    whole = interpreter.GridExecutor.__call__
    interpreter.GridExecutor.__call__ = launched
    interpreter.InterpretedFunction.__call__ = called
    of_any, of_plain = interpreter._get_np_dtype, cache(interpreter._get_np_dtype)
    interpreter._get_np_dtype = lambda of: of_plain(of) if type(of) is tl.dtype else of_any(of)
