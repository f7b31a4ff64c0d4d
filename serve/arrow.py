"""Arrow IPC streams as bodies, for many rows at once: a column a feature in, `prediction` and the scores out."""

import flatbuffers.table
import numpy as np
import pyarrow as pa
from flatbuffers import number_types

from ..datasets.schema import Bad, listed, prediction_columns, typed
from ..errors import RequestError
from .client import ARROW as TYPE
from .client import arrow_stream
from .messages import Answer, Ask, Identity

HEADER_TYPE, HEADER, COMPRESSION = 6, 8, 10
"""Places in the tables `Message` and `RecordBatch` of Arrow's `Message.fbs`."""
RECORD_BATCH = 3


def ask(body: bytes, model: Identity) -> Ask:
    """Raises RequestError, whose text never repeats what was sent."""
    features = model.schema.features
    try:
        _refuse_compressed(body)
        table = pa.ipc.open_stream(body).read_all()
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise RequestError(f"the body is not an Arrow IPC stream ({type(error).__name__})") from None
    names = [f.name for f in features]
    if unknown := [n for n in table.column_names if n not in names]:
        raise RequestError(f"the table has {len(unknown)} unknown columns; the features are {listed(names)}")
    if len(set(table.column_names)) != table.num_columns:
        raise RequestError("a column is given twice")
    if missing := [f.name for f in features if f.name not in table.column_names and not f.optional]:
        raise RequestError(f"the table lacks {listed(missing)}; the features are {listed(names)}")
    if not table.num_rows:
        raise RequestError("the table has no row")
    bad = Bad(table.num_rows)
    try:
        columns = typed(table, features, bad)
    except (pa.ArrowException, ValueError, TypeError) as error:
        raise RequestError(f"the table's types do not fit the schema ({type(error).__name__})") from None
    if bad.reasons:
        row, (column, reason) = min(bad.reasons.items())
        more = f" ({len(bad.reasons)} rows in all)" if len(bad.reasons) > 1 else ""
        raise RequestError(f"row {row}: `{column}` is {reason}{more}")
    return Ask(columns, table.num_rows, lambda outputs: _render(outputs, model))


def _render(outputs: np.ndarray, model: Identity) -> Answer:
    return Answer(200, TYPE, arrow_stream(pa.table(prediction_columns(outputs, model.schema))))


def _refuse_compressed(body: bytes) -> None:
    """A few compressed bytes could become gigabytes, and the reader has no limit."""
    at = 0
    while at + 8 <= len(body):
        start, size = at + 8, int.from_bytes(body[at + 4 : at + 8], "little", signed=True)
        if size <= 0 or start + size > len(body):
            return
        message = flatbuffers.table.Table(body, start + int.from_bytes(body[start : start + 4], "little"))
        kind_at, header_at, length_at = (message.Offset(n) for n in (HEADER_TYPE, HEADER, 10))
        if kind_at and header_at and message.Get(number_types.Uint8Flags, kind_at + message.Pos) == RECORD_BATCH:
            batch = flatbuffers.table.Table(body, message.Indirect(header_at + message.Pos))
            if batch.Offset(COMPRESSION):
                raise RequestError("compressed Arrow bodies are not taken: send the stream uncompressed", 415)
        length = message.Get(number_types.Int64Flags, length_at + message.Pos) if length_at else 0
        at = start + size + length
