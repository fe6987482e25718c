"""Compiled loop of the sampler (numba): the rows that what fires adds up to."""
import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from lib.training.kernels import compiled

AHEAD = 12  # rows asked for before they are added
LINE = 32  # numbers of a row that come from memory together


# This and _wide stand in sampler_loops too: numba's cache would not notice a change in another file.
@intrinsic
def _as_float32(typing, number):
    """The float32 that has these 32 bits."""
    def build(context, builder, signature, given):
        return builder.bitcast(given[0], ir.FloatType())
    return types.float32(types.uint32), build


@compiled()
def _wide(low):
    """float32 of the bits of a bfloat16."""
    return _as_float32(np.uint32(np.uint32(low) << np.uint32(16)))


@intrinsic
def _fetch(typing, row, i):
    """Ask for the memory of row[i], which is needed soon."""
    def build(context, builder, signature, given):
        array = context.make_array(signature.args[0])(context, builder, given[0])
        place = cgutils.get_item_pointer(context, builder, signature.args[0], ary=array, inds=[given[1]],
                                         wraparound=False)
        place, number = builder.bitcast(place, ir.IntType(8).as_pointer()), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [place.type, number, number, number])
        prefetch = builder.module.declare_intrinsic("llvm.prefetch", [place.type], kind)
        builder.call(prefetch, [place, number(0), number(2), number(1)])  # to read; into the second level; data
        return context.get_dummy_value()
    return types.void(row, types.int64), build


@compiled()
def _fetch_rows(rows, index, first, end):
    for c in range(first, min(end, len(index))):
        for i in range(0, rows.shape[1], LINE):
            _fetch(rows[index[c]], i)


@compiled()
def _add(index, value, rows, out):
    """Add value times row to out, four rows at a time."""
    _fetch_rows(rows, index, first=0, end=AHEAD)
    whole = len(index) // 4 * 4
    for c in range(0, whole, 4):
        _fetch_rows(rows, index, first=c + AHEAD, end=c + AHEAD + 4)
        a, b, d, e = rows[index[c]], rows[index[c + 1]], rows[index[c + 2]], rows[index[c + 3]]
        va, vb, vd, ve = value[c], value[c + 1], value[c + 2], value[c + 3]
        for i in range(len(out)):
            out[i] = out[i] + va * _wide(a[i]) + vb * _wide(b[i]) + vd * _wide(d[i]) + ve * _wide(e[i])
    for c in range(whole, len(index)):
        a, va = rows[index[c]], value[c]
        for i in range(len(out)):
            out[i] += va * _wide(a[i])


@compiled(parallel=True)
def add_up(found, rows, bias, x):
    """x [n, D] = bias [D] + value times row, over what fires. found: index, value [n, ROOM], count [n]; rows: bits of
    bfloat16 [N, D].
    """
    index, value, count = found
    for r in prange(len(x)):
        x[r] = bias
        n = count[r]
        _add(index[r, :n], value[r, :n], rows=rows, out=x[r])
