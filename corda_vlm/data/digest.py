"""Rows of data -> a digest: whether a run is gone on with on the data that it was begun with."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from PIL import Image

from corda_vlm.data.sources import ArrowRows

BATCH = 1000
"""Rows of a table that are held as Python's values at once."""


def digest_of_rows(rows: Sequence[Mapping[str, Any]], places: Sequence[int]) -> str:
    """Return the SHA-256, in hexadecimal, of the rows at some places, in their order.

    Values count, not what files hold them or when those were written. Pictures and sounds within rows count by their sizes, those in files
    by their names.
    """
    digest = hashlib.sha256()
    if isinstance(rows, ArrowRows):
        digest.update(_line({name: list(names) for name, names in rows.class_names.items()}))
    chosen = places if isinstance(places, range) else set(places)
    for place, row in enumerate(_light(rows)):
        if place in chosen:
            digest.update(_line(row))
    return digest.hexdigest()


def _line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row, sort_keys=True, default=_in_short).encode() + b"\n"


def _in_short(value: Any) -> str:
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    return f"{value.mode} {value.size}" if isinstance(value, Image.Image) else str(value)


def _light(rows: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Yield all rows; of a table's bytes the lengths, which are known without reading them."""
    if not isinstance(rows, ArrowRows):
        yield from rows
        return
    for start in range(0, len(rows), BATCH):
        batch = rows.table[start : start + BATCH].combine_chunks()
        columns = [_without_bytes(batch[name].combine_chunks()).to_pylist() for name in batch.column_names]
        yield from (dict(zip(batch.column_names, values, strict=True)) for values in zip(*columns, strict=True))


def _without_bytes(values: Any) -> Any:
    """Return an Arrow array with the lengths of its bytes in their place."""
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.compute as pc  # type: ignore[import-untyped]

    kind = values.type
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return pc.binary_length(values)
    if pa.types.is_struct(kind):
        fields = [_without_bytes(pc.struct_field(values, place)) for place in range(kind.num_fields)]
        return pa.StructArray.from_arrays(fields, [kind.field(place).name for place in range(kind.num_fields)], mask=values.is_null())
    if pa.types.is_list(kind):
        inner = _without_bytes(values.values)
        return pa.ListArray.from_arrays(values.offsets, inner, mask=values.is_null())
    return values
