"""Which ops may run in 16 bits: what gains from it, what follows its inputs, what stays in f32.

`aten.*` ops stand in the table below, by the name before the overload; `dfc.*` ops say it on their
class (`Op.precision`). What neither names stays in f32.
"""

from __future__ import annotations

from dfc.ir.graph import Node
from dfc.ir.op import DeclaredOp, Precision

# Products: the reads of weights and the multiplications are halved; kernels add up in f32.
_HALF = frozenset(
    """linear matmul mm bmm mv dot addmm addbmm baddbmm einsum bilinear conv1d conv2d conv3d
    convolution conv_transpose1d conv_transpose2d conv_transpose3d scaled_dot_product_attention
    embedding embedding_bag""".split()  # noqa: SIM905
)
# One rounding an element at most, and nothing that grows: they take the type of their inputs.
_FOLLOW = frozenset(
    """add sub rsub mul div neg abs sign relu relu6 leaky_relu prelu hardtanh clamp clamp_min
    clamp_max gelu silu tanh sigmoid hardswish hardsigmoid elu selu celu mish glu erf square
    where masked_fill maximum minimum fmod lerp dropout
    view reshape permute transpose t expand expand_as unsqueeze squeeze slice select cat stack
    split split_with_sizes chunk unbind flatten unflatten clone contiguous alias detach movedim
    repeat tile roll flip narrow pad constant_pad_nd reflection_pad1d reflection_pad2d
    replication_pad1d replication_pad2d gather index index_select unfold pixel_shuffle
    pixel_unshuffle amax amin max_pool1d max_pool2d max_pool3d upsample_nearest1d
    upsample_nearest2d upsample_nearest3d""".split()  # noqa: SIM905
)
# op -> why 8 or 11 significant bits, or a range up to 65 504, are not enough.
_F32: dict[str, str] = {
    name: reason
    for reason, names in {
        "its exponentials overflow, and their sum is long": "softmax _softmax log_softmax "
        "_log_softmax logsumexp softmin gumbel_softmax",
        "the model casts here itself": "_to_copy",
        "the statistics of a norm are long sums of squares": "layer_norm native_layer_norm "
        "group_norm native_group_norm batch_norm _native_batch_norm_legit_no_training "
        "instance_norm rms_norm _fused_rms_norm local_response_norm var std var_mean std_mean "
        "norm linalg_vector_norm linalg_norm linalg_matrix_norm normalize renorm",
        "it overflows, or loses what is small": "exp exp2 expm1 log log2 log10 log1p pow "
        "reciprocal rsqrt sqrt softplus logit cosh sinh tan erfinv lgamma digamma",
        "angles want all their digits": "sin cos asin acos atan atan2 sinc",
        "a long sum loses what is small": "sum mean nansum nanmean cumsum cumprod prod "
        "logcumsumexp avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
        "adaptive_avg_pool3d _adaptive_avg_pool2d trace cdist _cdist_forward cosine_similarity "
        "pairwise_distance dist index_add scatter_add",
        "a loss is a long sum of small terms": "mse_loss l1_loss smooth_l1_loss huber_loss "
        "nll_loss nll_loss_nd cross_entropy cross_entropy_loss binary_cross_entropy "
        "binary_cross_entropy_with_logits kl_div cosine_embedding_loss triplet_margin_loss "
        "poisson_nll_loss ctc_loss",
        "its state carries rounding from step to step": "lstm gru rnn_tanh rnn_relu lstm_cell "
        "gru_cell rnn_tanh_cell rnn_relu_cell",
        "rounding makes different numbers equal": "argmax argmin topk sort argsort eq ne lt le gt "
        "ge isclose unique searchsorted bucketize floor ceil round trunc median mode kthvalue "
        "max min",
    }.items()
    for name in names.split()
}  # fmt: skip
UNKNOWN = "nothing says that it may run in 16 bits"


def precision_of(node: Node) -> tuple[Precision, str]:
    """What a node's op may run in, and why."""
    info = node.info
    if isinstance(info, DeclaredOp):
        return _declared(info.cls.precision)
    namespace, _, rest = node.op.partition(".")
    name = rest.partition(".")[0]
    if namespace != "aten" or node.graphs:
        return "f32", UNKNOWN
    if name in _HALF:
        return "half", "it multiplies and adds up, with f32 sums inside"
    if name in _FOLLOW:
        return "follow", "it rounds once, if at all"
    return "f32", _F32.get(name, UNKNOWN)


def _declared(precision: Precision) -> tuple[Precision, str]:
    why = {
        "half": "its op says that it gains from 16 bits",
        "follow": "its op says that it takes the type of its inputs",
        "f32": "its op says that it stays in f32",
    }
    return precision, why[precision]
