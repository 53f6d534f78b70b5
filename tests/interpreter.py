"""Triton's interpreter, faster; every value that it computes stays the same, bit for bit.

A kernel's time there is that of its statements: each one creates types and constants anew and
checks them. Four things take most of it, and are done once, or otherwise, here:

* the interpreter replaces functions of ``triton.language`` while a kernel runs, and again at every
  call of a ``@triton.jit`` function inside, ``tl.sum`` and ``tl.cdiv`` included;
* types: shapes are checked, named and wrapped in every block, scalar types compared by lists;
* sums and products of integers are taken again in int64, to test for an overflow that is reported
  in debug mode only, which the interpreter does not have;
* a sort goes through a network of exchanges.
"""

from __future__ import annotations

from typing import Any

# The version whose types are replaced; others only have the language patched once, and the sort.
KNOWN = "3.7."


def speed_up() -> None:
    """Replace the slow parts of the interpreter."""
    import triton

    _patch_once()
    _quick_sort()
    if triton.__version__.startswith(KNOWN):
        _quick_types()
        _quick_values()
        _quick_semantic()


def _quick_sort() -> None:
    """Keys are sorted by NumPy, not by a network of exchanges."""
    import numpy as np
    from triton import language as tl
    from triton.runtime import interpreter

    def sort(x: Any) -> Any:
        keys = interpreter.TensorHandle(np.sort(x.handle.data), x.handle.dtype)
        return tl.tensor(keys, x.type)

    sort.network = tl.sort  # type: ignore[attr-defined]
    tl.sort = sort


def _patch_once() -> None:
    """Modules of the language stay patched until the launch ends."""
    from triton import language as tl
    from triton.runtime import interpreter

    patch, scope_type = interpreter._patch_lang, interpreter._LangPatchScope
    launch: list[Any] = []  # scopes of the launch under way, the outermost first
    patched: set[tuple[bool, ...]] = set()
    keys: dict[Any, tuple[bool, ...]] = {}  # of a function: the modules that it sees
    changes: dict[Any, list[Any]] = {}  # that a patch made, by what was patched before it

    class Outermost(scope_type):
        def restore(self) -> None:
            for scope in reversed(launch):
                scope_type.restore(scope)
            launch.clear()
            patched.clear()

    def patch_lang(fn: Any) -> Any:
        key = keys.get(fn)
        if key is None:
            values = list(fn.__globals__.values())
            key = keys[fn] = tuple(any(v is m for v in values) for m in (tl, tl.core))
        if key in patched:
            return scope_type()
        path = (*sorted(patched), key)
        if path in changes:
            scope = scope_type()
            for change in changes[path]:
                scope.set_attr(*change)
        else:
            scope = patch(fn)
            changes[path] = [(at, name, vars(at)[name]) for at, name, _ in scope._changes]
        if not launch:
            scope.__class__ = Outermost
        launch.append(scope)
        patched.add(key)
        return scope

    def patch_attr(obj: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        # The function itself: its wrapper only tests that ``_semantic`` is given.
        function = getattr(member, "__wrapped__", member)

        def called(*args: Any, **kwargs: Any) -> Any:
            kwargs["_semantic"] = interpreter.interpreter_semantic
            return function(*args, **kwargs)

        scope.set_attr(obj, name, called)

    interpreter._patch_lang = patch_lang
    interpreter._patch_attr = patch_attr


def _quick_types() -> None:
    """Shapes are checked once, scalar types are looked up in sets."""
    from triton.language import core
    from triton.runtime import interpreter

    dtype, block_type, constexpr = core.dtype, core.block_type, core.constexpr
    signed, unsigned = frozenset(dtype.SINT_TYPES), frozenset(dtype.UINT_TYPES)
    integral, floating = signed | unsigned, frozenset(dtype.FP_TYPES)
    standard = frozenset(dtype.STANDARD_FP_TYPES)
    plain = integral | standard
    dtype.is_int = lambda self: self.name in integral
    dtype.is_int_signed = lambda self: self.name in signed
    dtype.is_int_unsigned = lambda self: self.name in unsigned
    dtype.is_floating = lambda self: self.name in floating
    dtype.is_standard_floating = lambda self: self.name in standard

    for kind in (dtype, core.pointer_type):

        def same(self: Any, other: Any, equal: Any = kind.__eq__) -> bool:
            return self is other or equal(self, other)

        kind.__eq__ = same

    unwrap, bare = core._unwrap_if_constexpr, {core.tensor, int, float, bool, type(None)}

    def unwrap_quickly(value: Any) -> Any:
        kind = type(value)
        if kind is constexpr:
            return value.value
        return value if kind in bare else unwrap(value)

    core._unwrap_if_constexpr = unwrap_quickly

    init, to_ir = block_type.__init__, block_type.to_ir
    shapes: dict[tuple[int, ...], tuple[Any, ...]] = {}

    def block(self: Any, element_ty: Any, shape: Any) -> None:
        known = shape.__dict__.get("known") if type(shape) is core.tuple else None
        if known is None:
            key = tuple([n.value if type(n) is constexpr else n for n in shape])
            whole = all([type(n) is int for n in key])  # 2.0 is no size, and equals 2
            known = shapes.get(key) if whole else None
            if known is None:
                init(self, element_ty, shape)  # raises where the shape is none
                wrapped = core.tuple([constexpr(n) for n in self.shape])
                known = (self.shape, self.numel, wrapped, constexpr(self.numel))
                self.shape.known = wrapped.known = known
                if whole:
                    shapes[key] = known
        self.element_ty, self.known = element_ty, known
        self.shape, self.numel = known[:2]

    def block_to_ir(self: Any, builder: Any) -> Any:
        # To the interpreter, blocks of plain numbers are what they are to the language.
        if builder is interpreter.interpreter_builder and self.element_ty.name in plain:
            return self
        return to_ir(self, builder)

    def equal_blocks(self: Any, other: Any) -> bool:
        if not isinstance(other, block_type):
            return False
        return self.element_ty == other.element_ty and (
            self.known is other.known or bool(self.shape == other.shape)
        )

    nothing = (core.tuple([]), constexpr(1))

    def tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = type.known[2:] if isinstance(type, block_type) else nothing

    # Of use in messages only; the initialiser's is passed over.
    name = property(lambda self: f"<{self.shape}, {self.element_ty}>", lambda self, value: None)
    block_type.name = name
    block_type.__init__, block_type.to_ir = block, block_to_ir
    block_type.__eq__ = equal_blocks
    core.tensor.__init__ = tensor


def _quick_values() -> None:
    """Arrays of the interpreter: types by name."""
    import numpy as np
    from triton import language as tl
    from triton.runtime import interpreter

    names = (*tl.dtype.SINT_TYPES, *tl.dtype.UINT_TYPES, *tl.dtype.FP_TYPES)
    arrays = {name: interpreter._get_np_dtype(tl.dtype(name)) for name in names}
    bits = {name: max(tl.dtype(name).primitive_bitwidth, 8) for name in names}
    pointer, handle_type = np.dtype(np.uint64), interpreter.TensorHandle
    fits = interpreter._validate_np_data_size

    def np_dtype(type: Any) -> Any:
        while isinstance(type, tl.block_type):
            type = type.element_ty
        return pointer if isinstance(type, tl.pointer_type) else arrays[type.name]

    def fits_quickly(array: Any, type: Any) -> bool:
        width = bits.get(type.name)
        return fits(array, type) if width is None else array.itemsize * 8 <= width

    handle = handle_type.__init__

    def quick_handle(self: Any, data: Any, dtype: Any, attr: Any = None) -> None:
        width = bits.get(dtype.name)
        if attr is not None or (width is not None and data.itemsize * 8 > width):
            return handle(self, data, dtype, {} if attr is None else attr)
        self.data, self.dtype, self.attr = data, dtype, {}

    def splat(self: Any, ret_ty: Any, arg: Any) -> Any:
        value = arg.data[0] if isinstance(arg.dtype, tl.block_type) else arg.data
        filled = np.empty(ret_ty.shape.values, dtype=np_dtype(arg.dtype))
        filled[...] = value
        return handle_type(filled, arg.dtype.scalar)

    interpreter.InterpreterBuilder.create_splat = splat
    interpreter._get_np_dtype = np_dtype
    interpreter._validate_np_data_size = fits_quickly
    handle_type.__init__ = quick_handle


def _quick_semantic() -> None:
    """Rules of types: once for every pair; no test for an overflow that is reported nowhere."""
    from triton.language import core
    from triton.runtime import interpreter

    semantic = type(interpreter.interpreter_semantic)
    promoted: dict[tuple[Any, ...], Any] = {}
    known = core.dtype
    numbers = frozenset((*known.SINT_TYPES, *known.UINT_TYPES, *known.STANDARD_FP_TYPES))
    ranges = {
        name: (type_.get_int_min_value(), type_.get_int_max_value())
        for name in (*known.SINT_TYPES, *known.UINT_TYPES)
        if not (type_ := known(name)).is_bool()
    }
    nothing = (1, 0)

    class Quick(semantic):
        def computation_type_impl(
            self, a_ty: Any, a_is_scalar: bool, b_ty: Any, b_is_scalar: bool, div_or_mod: bool
        ) -> Any:
            key = (a_ty.name, a_is_scalar, b_ty.name, b_is_scalar, div_or_mod)
            found = promoted.get(key)
            if found is None:
                found = super().computation_type_impl(
                    a_ty, a_is_scalar, b_ty, b_is_scalar, div_or_mod
                )
                promoted[key] = found
            return found

        def binary_op_type_checking_impl(
            self,
            lhs: Any,
            rhs: Any,
            allow_lhs_ptr: bool = False,
            allow_rhs_ptr: bool = False,
            arithmetic_check: bool = True,
            div_or_mod: bool = False,
        ) -> Any:
            # Of one type, an integer beside an integer that fits, or a place and an integer.
            if not div_or_mod:
                left, right = getattr(lhs, "dtype", None), getattr(rhs, "dtype", None)
                if left is not None and right is not None:
                    if left is right:
                        if left.name in numbers:
                            return self.broadcast_impl_value(lhs, rhs)
                    elif allow_lhs_ptr and left.is_ptr() and right.name in ranges:
                        return self.broadcast_impl_value(lhs, rhs)
                elif arithmetic_check and left is not None and type(rhs) is int:
                    lowest, highest = ranges.get(left.name, nothing)
                    if lowest <= rhs <= highest:
                        return self.broadcast_impl_value(lhs, self.scalar_constant(rhs, left))
                elif arithmetic_check and right is not None and type(lhs) is int:
                    lowest, highest = ranges.get(right.name, nothing)
                    if lowest <= lhs <= highest:
                        return self.broadcast_impl_value(self.scalar_constant(lhs, right), rhs)
            return super().binary_op_type_checking_impl(
                lhs, rhs, allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod
            )

        def binary_op_sanitize_overflow_impl(self, lhs: Any, rhs: Any, binary_op: Any) -> None:
            if self.builder.options.debug:
                super().binary_op_sanitize_overflow_impl(lhs, rhs, binary_op)

        def broadcast_impl_value(self, lhs: Any, rhs: Any) -> Any:
            left, right = lhs.type, rhs.type
            if left.is_block():
                if not right.is_block():
                    return lhs, self.splat(rhs, left.shape)
                if left.known is right.known:
                    return lhs, rhs
            elif right.is_block():
                return self.splat(lhs, right.shape), rhs
            else:
                return lhs, rhs
            return super().broadcast_impl_value(lhs, rhs)

        def cast(self, input: Any, dst_ty: Any, *rounding: Any, **named: Any) -> Any:
            if input.dtype is dst_ty:
                return input
            return super().cast(input, dst_ty, *rounding, **named)

    interpreter.interpreter_semantic.__class__ = Quick
