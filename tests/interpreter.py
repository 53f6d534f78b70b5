"""Triton's interpreter, faster: the language is patched once a launch.

The interpreter replaces functions of ``triton.language`` while a kernel runs, and does so again at
every call of a ``@triton.jit`` function inside, ``tl.sum`` and ``tl.cdiv`` included: a third to a
half of the time of small kernels. What a module of the language was patched with stays until the
launch ends, so once is enough.
"""

from __future__ import annotations

from typing import Any


def speed_up() -> None:
    """Replace the interpreter's patching by one that passes over what is patched already."""
    from triton import language as tl
    from triton.runtime import interpreter

    patch, scope_type = interpreter._patch_lang, interpreter._LangPatchScope
    launch: list[Any] = []  # scopes of the launch under way, the outermost first
    patched: set[tuple[bool, ...]] = set()

    class Outermost(scope_type):
        def restore(self) -> None:
            for scope in reversed(launch):
                scope_type.restore(scope)
            launch.clear()
            patched.clear()

    def patch_lang(fn: Any) -> Any:
        modules = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
        key = (tl in modules, tl.core in modules)
        if key in patched:
            return scope_type()
        scope = patch(fn)
        if not launch:
            scope.__class__ = Outermost
        launch.append(scope)
        patched.add(key)
        return scope

    interpreter._patch_lang = patch_lang
