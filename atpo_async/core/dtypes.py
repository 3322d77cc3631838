"""Number formats: which ones arrays have on the wire, and which ones tensors have, by their names and codes.

``models.causal_lm.torch_dtype`` finds torch's own object of a name.
"""

from __future__ import annotations

import numpy as np

from atpo_async.core.vocabulary import Precision

WIRE_DTYPES = (np.dtype("<i4"), np.dtype("<f4"), np.dtype("u1"))
"""Of arrays in messages; the position is the code on the wire."""
INT32, FLOAT32, UINT8 = WIRE_DTYPES

PRECISION_BYTES: dict[Precision, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes an item of the precisions that weights are published, generated with and exported in."""

PRECISION_IN_FILES: dict[str, Precision] = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""Their codes in the header of a safetensors file."""

FILE_DTYPES: dict[str, str] = {
    **PRECISION_IN_FILES,
    "F64": "float64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
"""Every code of a safetensors header that this program knows -> torch's name."""
