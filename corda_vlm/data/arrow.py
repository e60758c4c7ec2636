"""Rows of a table of ``datasets``, which stay on the disk until they are asked for."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BATCH = 1000
"""Rows that are held as Python's values at once."""


@dataclass(frozen=True)
class ArrowRows(Sequence[Mapping[str, Any]]):
    """Rows of a table as plain values: images stay bytes or paths, classes become their names."""

    table: Any
    class_names: Mapping[str, Sequence[str]]

    @classmethod
    def of(cls, table: Any, limit: int | None) -> "ArrowRows":
        """Take the first rows of a table."""
        if limit is not None:
            table = table.select(range(min(limit, len(table))))
        names = {name: feature.names for name, feature in table.features.items() if hasattr(feature, "int2str")}
        return cls(table.with_format("arrow"), names)

    @property
    def names(self) -> Sequence[str]:
        """The columns."""
        return list(self.table.column_names)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: Any) -> Any:
        row = self.table[index].to_pylist()[0]
        # -1 means no class, in test splits.
        classes = {name: names[row[name]] if row[name] not in (None, -1) else None for name, names in self.class_names.items()}
        return row | classes

    def with_lengths(self) -> Iterator[Mapping[str, Any]]:
        """Yield the rows with the lengths of bytes in their place, which are known without reading them, and classes as numbers."""
        for start in range(0, len(self), BATCH):
            batch = self.table[start : start + BATCH].combine_chunks()
            columns = [_without_bytes(batch[name].combine_chunks()).to_pylist() for name in batch.column_names]
            yield from (dict(zip(batch.column_names, values, strict=True)) for values in zip(*columns, strict=True))


def _without_bytes(values: Any) -> Any:
    """Return an Arrow array with the lengths of bytes in their place."""
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.compute as pc  # type: ignore[import-untyped]

    kind = values.type
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return pc.binary_length(values)
    if pa.types.is_struct(kind):
        fields = [_without_bytes(pc.struct_field(values, place)) for place in range(kind.num_fields)]
        return pa.StructArray.from_arrays(fields, [kind.field(place).name for place in range(kind.num_fields)], mask=values.is_null())
    if pa.types.is_list(kind):
        return pa.ListArray.from_arrays(values.offsets, _without_bytes(values.values), mask=values.is_null())
    return values
