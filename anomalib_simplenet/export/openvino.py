"""OpenVINO models: resize and precision."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from anomalib_simplenet.compat import mark_precise

if TYPE_CHECKING:
    import openvino as ov


def prepend_resize(model: ov.Model, input_size: tuple[int, int] | None) -> ov.Model:
    """Let a model of images ``(N, 3, h, w)`` resize others to that size first, antialiased as in training, and fast.

    ``input_size`` is the ``(height, width)`` to accept, ``None`` for any. First rows, then columns, each with the other
    axis in the place of channels: OpenVINO's resize of three channels, one vector a pixel, takes two to three times as
    long. With axes 1 and 2 it takes the last one for channels, and does not change the layout.
    """
    from openvino import PartialShape, opset11

    def resize(maps: ov.Node, size: int) -> ov.Node:
        pillow = {"mode": "bilinear_pillow", "shape_calculation_mode": "sizes", "axes": [1, 2]}
        return opset11.interpolate(maps, [1, size], **pillow)

    old = model.get_parameters()[0]
    batch, channels, height, width = old.get_partial_shape()
    shape = PartialShape([batch, channels, *(input_size or (-1, -1))])
    image = opset11.parameter(shape, old.get_element_type(), name=old.get_friendly_name())
    image.set_layout(old.get_layout())
    image.output(0).set_names(old.output(0).get_names())
    old.output(0).set_names(set())
    planes = opset11.reshape(image, [-1, 1, 0, 0], special_zero=True)  # computed in parallel
    rows = resize(planes, height.get_length())
    if height.get_length() % 2 == 0:  # six halves of planes share out better between two threads than three planes
        rows = opset11.reshape(rows, [-1, 1, height.get_length() // 2, 0], special_zero=True)
    columns = resize(opset11.transpose(rows, [0, 1, 3, 2]), width.get_length())
    size = [-1, channels.get_length(), height.get_length(), width.get_length()]
    resized = opset11.reshape(opset11.transpose(columns, [0, 1, 3, 2]), size, special_zero=False)
    old.output(0).replace(resized.output(0))
    model.replace_parameter(0, image)
    return model


def round_weights(model: ov.Model) -> None:
    """Store weights of convolutions and matrix products in half precision.

    ``openvino.save_model`` would round thresholds and the table behind p-values, too.
    """
    from openvino import opset1

    for node in model.get_ops():
        if node.get_type_name() in {"Convolution", "GroupConvolution", "MatMul"}:
            for port in node.inputs():
                weight = port.get_source_output().get_node()
                if weight.get_type_name() == "Constant" and weight.get_element_type().get_type_name() == "f32":
                    half = weight.data.astype(np.float16)
                    if np.isfinite(half).all():
                        port.replace_source_output(opset1.convert(opset1.constant(half), "f32").output(0))


def keep_float32(model: ov.Model) -> None:
    """Mark all operations as sensitive to precision.

    Where the processor supports bfloat16, OpenVINO uses it by default. Scores then move by several hundredths of their
    range, and labels with them. Weights are not marked: FP16 compression still halves the file, and quantized
    operations are computed in eight bits. Operations that OpenVINO replaces when it compiles lose the mark: max pooling
    is replaced here already; layer norm, attention and splits of channels stay in bfloat16.
    """
    from openvino import opset1

    for node in model.get_ops():
        attributes = node.get_attributes()
        if node.get_type_name() == "MaxPool" and set(attributes.get("dilations", [0])) == {1}:
            names = ("strides", "pads_begin", "pads_end", "kernel", "rounding_type", "auto_pad")
            pool = opset1.max_pool(node.input_value(0), *(attributes[name] for name in names))
            pool.set_friendly_name(node.get_friendly_name())
            node.output(0).replace(pool.output(0))
    for node in model.get_ops():
        if node.get_type_name() != "Constant":
            mark_precise(node)
