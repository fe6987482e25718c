"""The compiled loops' dot product, written in the compiler's own instructions (numba, llvmlite).

A loop over an array of partial sums leaves them in memory, which costs three to four times as much.
"""
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.errors import TypingError
from numba.extending import intrinsic

LANES, WIDE = 64, 16  # partial sums, and how many of them are one vector
INT, VECTOR = ir.IntType(32), ir.VectorType(ir.FloatType(), WIDE)
ROWS = types.Array(types.float32, 1, "C")


@intrinsic
def dot64(_context, a, b):
    """Sum of products of two contiguous float32 arrays [n], in a fixed order on every machine.

    Product i goes to partial sum i % 64; then the upper half of the sums is added to the lower until one is left.
    numba's cache does not notice a change in another file than the loop's own: who changes this gives it another name,
    so that the files that use it change too.
    """
    if (a, b) != (ROWS, ROWS):
        raise TypingError("dot64 takes two contiguous float32 arrays of one dimension")
    return types.float32(ROWS, ROWS), _write_dot


def _write_dot(context, builder, signature, args):
    arrays = [context.make_array(kind)(context, builder, value) for kind, value in zip(signature.args, args)]
    size = builder.trunc(cgutils.unpack_tuple(builder, arrays[0].shape)[0], INT)
    starts = [array.data for array in arrays]
    zeros = ir.Constant(VECTOR, [0.0] * WIDE)
    sums = [cgutils.alloca_once_value(builder, zeros) for _ in range(LANES // WIDE)]

    def add_products(first, load):
        for part, total in enumerate(sums):
            at = builder.add(first, INT(part * WIDE))
            left, right = (load(builder.bitcast(builder.gep(start, [at]), VECTOR.as_pointer()), part)
                           for start in starts)
            builder.store(builder.fadd(builder.load(total), builder.fmul(left, right)), total)

    whole = builder.and_(size, INT(-LANES))
    with cgutils.for_range_slice(builder, INT(0), stop=whole, step=INT(LANES), intp=INT) as (first, _):
        add_products(first, lambda place, part: builder.load(place, align=4))
    rest = builder.sub(size, whole)
    with builder.if_then(builder.icmp_signed(">", rest, INT(0))):
        add_products(whole, lambda place, part: _load_first(builder, place, builder.sub(rest, INT(part * WIDE))))
    return _halved(builder, [builder.load(total) for total in sums])


def _load_first(builder, place, count):
    """The first `count` floats at a place; 0 in the others, which are not read."""
    mask, kinds = ir.VectorType(ir.IntType(1), WIDE), ir.VectorType(INT, WIDE)
    pointer = VECTOR.as_pointer()
    load = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(VECTOR, [pointer, INT, mask, VECTOR]), f"llvm.masked.load.v{WIDE}f32.p0")
    some = builder.insert_element(ir.Constant(kinds, ir.Undefined), count, INT(0))
    counts = builder.shuffle_vector(some, some, ir.Constant(kinds, [0] * WIDE))
    wanted = builder.icmp_signed("<", ir.Constant(kinds, list(range(WIDE))), counts)
    return builder.call(load, [place, INT(4), wanted, ir.Constant(VECTOR, [0.0] * WIDE)])


def _halved(builder, vectors):
    """The sum of all lanes: the upper half added to the lower until one is left."""
    while len(vectors) > 1:
        half = len(vectors) // 2
        vectors = [builder.fadd(low, high) for low, high in zip(vectors[:half], vectors[half:])]
    [vector], size = vectors, WIDE
    while size > 1:
        size //= 2
        low, high = (ir.Constant(ir.VectorType(INT, size), list(range(at, at + size))) for at in (0, size))
        vector = builder.fadd(*(builder.shuffle_vector(vector, vector, half) for half in (low, high)))
    return builder.extract_element(vector, INT(0))
