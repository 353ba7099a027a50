"""Turn a network into an ONNX graph that takes pictures as they are and answers at their size.

The graph has three parts. The *core* is the network between padded pixels and low-resolution logits, exported by
torch. The *head* before it pads pictures to the network's stride, and the *tail* after it resizes to the wanted size,
crops, and takes the largest logit. Head and tail are written here in ONNX's own text form, because the sizes in them
are data: the exporter would have to prove what they say about every layer between.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence

import onnx
import torch
from onnx import ModelProto, TensorProto, helper
from segmentation_models_pytorch.encoders._efficientnet import Conv2dDynamicSamePadding
from timm.layers import Conv2dSame
from torch import Tensor, nn

from pseudoseg_fast.deploy.metadata import Metadata
from pseudoseg_fast.network import Network

OPSET = 18
"""ONNX Runtime's CUDA provider has no Resize of opset 19: it would run on the CPU."""
IR_VERSION = 8
CAM_OUTPUTS = ("cam", "sgc_logits")

_HEAD = """
head (uint8[batch, {channels}, height, width] images) => (float[batch, {channels}, rows, columns] pixels)
{{
    head_side = Shape <start = 2> (images)
    head_stride = Constant <value_ints = [{stride}, {stride}]> ()
    head_minus = Neg (head_side)
    head_missing = Mod (head_minus, head_stride)
    head_before = Constant <value_ints = [0, 0, 0, 0, 0, 0]> ()
    head_pads = Concat <axis = 0> (head_before, head_missing)
    head_fill = Constant <value = float[1, {channels}, 1, 1] {{{fill}}}> ()
    head_float = Cast <to = 1> (images)
    head_shifted = Sub (head_float, head_fill)
    head_padded = Pad <mode = "constant"> (head_shifted, head_pads)
    pixels = Add (head_padded, head_fill)
}}
"""

_VALID = """
valid (uint8[batch, {channels}, height, width] images, int64[8] head_pads) => (bool[batch, rows, columns] valid)
{{
    valid_ends = Constant <value_ints = [0, 2, 3]> ()
    valid_all = Shape (images)
    valid_shape = Gather <axis = 0> (valid_all, valid_ends)
    valid_ones = ConstantOfShape <value = float[1] {{1}}> (valid_shape)
    valid_places = Constant <value_ints = [0, 2, 3, 4, 6, 7]> ()
    valid_pads = Gather <axis = 0> (head_pads, valid_places)
    valid_padded = Pad <mode = "constant"> (valid_ones, valid_pads)
    valid = Cast <to = 9> (valid_padded)
}}
"""

# A side s of the picture, p of the padded picture and w wanted: the maps grow to round(p w / s) and are cut to w.
_SIZES = """
sizes (int64[2] head_side, int64[2] head_missing, int64[2] size) => (int64[2] tail_size, int64[2] tail_full)
{
    tail_none = Constant <value_ints = [0, 0]> ()
    tail_two = Constant <value_int = 2> ()
    tail_given = Greater (size, tail_none)
    tail_size = Where (tail_given, size, head_side)
    tail_side = Add (head_side, head_missing)
    tail_product = Mul (tail_side, tail_size)
    tail_twice = Mul (tail_product, tail_two)
    tail_sum = Add (tail_twice, head_side)
    tail_divisor = Mul (head_side, tail_two)
    tail_full = Div (tail_sum, tail_divisor)
    tail_axes = Constant <value_ints = [-2, -1]> ()
}
"""

_RESIZE = """
resize (float[batch, channels, h, w] {map}, int64[2] tail_full) => (float[batch, channels, rows, columns] {map}_full)
{{
    {map}_channels = Shape <start = 0, end = 2> ({map})
    {map}_sizes = Concat <axis = 0> ({map}_channels, tail_full)
    {map}_full = Resize <mode = "linear", coordinate_transformation_mode = "{coordinates}"> ({map}, , , {map}_sizes)
}}
"""

_TAILS = {
    # The largest logit first and the cut afterwards: one byte a pixel is cut instead of C floats.
    "labels": """
tail (float[batch, channels, rows, columns] decoder_logits_full) => (uint8[batch, height, width] labels)
{
    tail_largest = ArgMax <axis = 1, keepdims = 0> (decoder_logits_full)
    tail_ids = Cast <to = 2> (tail_largest)
    labels = Slice (tail_ids, tail_none, tail_size, tail_axes)
}
""",
    "probabilities": """
tail (float[batch, classes, rows, columns] decoder_logits_full) => (float[batch, classes, height, width] probabilities)
{
    tail_cut = Slice (decoder_logits_full, tail_none, tail_size, tail_axes)
    probabilities = Softmax <axis = 1> (tail_cut)
}
""",
    "logits": """
tail (float[batch, channels, rows, columns] decoder_logits_full) => (float[batch, channels, height, width] logits)
{
    logits = Slice (decoder_logits_full, tail_none, tail_size, tail_axes)
}
""",
    "map": """
tail (float[batch, channels, rows, columns] {map}_map_full) => (float[batch, channels, height, width] {map})
{
    {map} = Slice ({map}_map_full, tail_none, tail_size, tail_axes)
}
""",
}


class Core(nn.Module):
    """From padded pixels [B, in_channels, H', W'], float32 in 0..255, to float32 logits [B, C, h, w].

    Args:
        network: is copied; the copy's paddings are fixed for sides that are multiples of its stride.
        cam: also return the class activation maps [B, K, h5, w5] and the SGC logits [B, C, h5, w5].
        half: compute encoder and decoder in float16; the normalisation, the classifier and SGC stay float32.
    """

    def __init__(self, network: Network, *, cam: bool = False, half: bool = False) -> None:
        super().__init__()
        network = copy.deepcopy(network).float().cpu().eval()
        fix_paddings(network)
        self.dtype = torch.float16 if half else torch.float32
        for part in (network.encoder, network.decoder, network.segmentation_head):
            part.to(self.dtype)
        self.network = network
        self.cam = cam

    def forward(self, pixels: Tensor, valid: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Return the decoder's logits, and with ``cam`` the two maps; ``valid`` as in :class:`Network`."""
        decoder_logits, f5, f4 = self.network.features(self.network.normalize(pixels).to(self.dtype))
        if not self.cam:
            return decoder_logits.float()
        f5, f4 = f5.float(), f4.float()
        class_logits = self.network.classifier(f5.mean((2, 3)))
        return decoder_logits.float(), *self.network.localize(f5, f4, class_logits, valid=valid)


def fix_paddings(module: nn.Module) -> None:
    """Replace convolutions of TensorFlow's SAME padding by ones that pad a fixed number of pixels, in place.

    Their padding depends on the size of what they get, but not where sides are multiples of the stride, which they
    are in a padded picture: (k - 1) d + 1 - s, the odd pixel on the right. As expressions of symbolic sides these
    paddings made the export of a network ten times slower.
    """
    for name, child in module.named_children():
        if isinstance(child, Conv2dSame | Conv2dDynamicSamePadding):
            total = [
                max((kernel - 1) * dilation + 1 - stride, 0)
                for kernel, dilation, stride in zip(
                    child.kernel_size, child.dilation, child.stride, strict=True
                )
            ]
            top, left = (side // 2 for side in total)
            convolution = nn.Conv2d(
                child.in_channels,
                child.out_channels,
                child.kernel_size,  # type: ignore[arg-type]
                tuple(child.stride),
                dilation=child.dilation,  # type: ignore[arg-type]
                groups=child.groups,
                bias=child.bias is not None,
            )
            convolution.weight, convolution.bias = child.weight, child.bias
            padding = nn.ZeroPad2d((left, total[1] - left, top, total[0] - top))
            setattr(module, name, nn.Sequential(padding, convolution))
        else:
            fix_paddings(child)


def export_core(core: Core) -> ModelProto:
    """Export the network between padded pixels and low-resolution maps; batch and sides are dynamic.

    Inputs are ``pixels`` and, for the maps, ``valid``; outputs ``decoder_logits`` and then ``cam_map`` and
    ``sgc_logits_map``.

    Raises:
        RuntimeError: torch cannot export this architecture for every size.
    """
    network = core.network
    stride, sides = network.stride, (torch.export.Dim("h"), torch.export.Dim("w"))
    batch, height, width = torch.export.Dim("batch"), stride * sides[0], stride * sides[1]
    size = (2, network.in_channels, 10 * stride, 12 * stride)
    inputs: tuple[Tensor, ...] = (torch.rand(size) * 255,)
    shapes: tuple[dict[int, object], ...] = ({0: batch, 2: height, 3: width},)
    outputs = ["decoder_logits"]
    if core.cam:
        inputs = (*inputs, torch.ones(size[0], *size[2:], dtype=torch.bool))
        shapes = (*shapes, {0: batch, 1: height, 2: width})
        outputs += [f"{name}_map" for name in CAM_OUTPUTS]
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of names of dimensions, and of versions inside the exporter
            program = torch.onnx.export(
                core,
                inputs,
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=shapes,
                input_names=["pixels", "valid"][: len(inputs)],
                output_names=outputs,
                verbose=False,
            )
    except Exception as error:  # the exporter raises whatever its stages raise
        reason = str(error.__cause__ or error).strip() or type(error).__name__
        raise RuntimeError(
            f"torch cannot export {network.arch} for every size, use another arch: {reason.splitlines()[0]}"
        ) from error
    assert program is not None
    model = program.model_proto
    # The symbolic expressions of the shapes can outgrow the graph, and nothing needs them.
    del model.graph.value_info[:]
    for value in model.graph.output:
        del value.type.tensor_type.shape.dim[2:]
        for side in ("map_height", "map_width"):
            value.type.tensor_type.shape.dim.add().dim_param = f"{value.name}_{side}"
    return model


def assemble(core: ModelProto, network: Network, metadata: Metadata, *, align_corners: bool) -> ModelProto:
    """Put head and tail around a core and write the metadata.

    The graph's inputs are ``images`` uint8 [batch, channels, height, width] and, with a default, ``size`` int64 [2],
    the height and width of the answer; 0 is the picture's own. Its outputs are that of ``metadata.output``: ``labels``
    uint8 [batch, H, W], ``probabilities`` or ``logits`` float32 [batch, C, H, W]; and for a core with maps ``cam``
    [batch, K, H, W] in 0..1 and ``sgc_logits`` [batch, C, H, W].
    """
    fill = ", ".join(f"{value:.0f}" for value in (255 * network.mean).round().tolist())
    coordinates = "align_corners" if align_corners else "half_pixel"
    maps = ["decoder_logits", *(value.name for value in core.graph.output[1:])]
    texts = [_HEAD.format(channels=network.in_channels, stride=network.stride, fill=fill)]
    if len(maps) > 1:
        texts.append(_VALID.format(channels=network.in_channels))
    nodes = [node for text in texts for node in _nodes(text)]
    nodes += core.graph.node
    tails = [_TAILS[metadata.output]]
    tails += [_TAILS["map"].replace("{map}", name.removesuffix("_map")) for name in maps[1:]]
    resizes = [_RESIZE.format(map=name, coordinates=coordinates) for name in maps]
    nodes += [node for text in (_SIZES, *resizes, *tails) for node in _nodes(text)]

    size = helper.make_tensor("size", TensorProto.INT64, [2], [0, 0])
    classes = len(metadata.classes)
    if metadata.output == "labels":
        outputs = [
            helper.make_tensor_value_info(
                "labels", TensorProto.UINT8, ["batch", "output_height", "output_width"]
            )
        ]
    else:
        outputs = [_map_info(metadata.output, classes)]
    if len(maps) > 1:
        outputs += [_map_info("cam", len(network.classifier.weight)), _map_info("sgc_logits", classes)]
    graph = helper.make_graph(
        nodes,
        "pseudoseg_fast",
        [
            helper.make_tensor_value_info(
                "images", TensorProto.UINT8, ["batch", network.in_channels, "height", "width"]
            ),
            helper.make_tensor_value_info("size", TensorProto.INT64, [2]),
        ],
        outputs,
        [*core.graph.initializer, size],
    )
    model = helper.make_model(
        graph,
        producer_name="pseudoseg_fast",
        producer_version=metadata.versions.get("pseudoseg_fast", ""),
        ir_version=max(IR_VERSION, core.ir_version),
        opset_imports=core.opset_import,
    )
    helper.set_model_props(model, metadata.properties())
    return model


def _map_info(name: str, channels: int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(
        name, TensorProto.FLOAT, ["batch", channels, "output_height", "output_width"]
    )


def _nodes(text: str) -> Sequence[onnx.NodeProto]:
    return onnx.parser.parse_graph(text).node
