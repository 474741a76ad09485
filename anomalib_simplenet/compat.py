"""Every use of a private or undocumented name of another library.

Each function says what it is for and where upstream discusses it; ``tests/unit/test_upstream.py`` says in a sentence
what changed should one stop working.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import openvino as ov


def mark_precise(node: ov.Node) -> None:
    """Keep an OpenVINO operation in float32 on processors that compute in bfloat16 by default.

    ``precise_0`` is the serialized name of OpenVINO's ``DisableFP16Compression`` attribute
    (``src/common/transformations/include/transformations/rt_info/disable_fp16_compression.hpp``), which has no public
    Python name. The public ``INFERENCE_PRECISION_HINT`` is the user's to set and cannot be saved in a model.
    """
    node.get_rt_info()["precise_0"] = ""
