"""Classes of operators that start and run alike, by their names in ATen; and what elements take.

An operator that no class names is `plain`: one pass over its elements.
"""

from __future__ import annotations

VIEWS = frozenset([
    "view", "reshape", "expand", "permute", "transpose", "t", "unsqueeze", "squeeze", "slice",
    "select", "split", "split_with_sizes", "chunk", "detach", "alias", "unbind", "unflatten",
    "flatten", "movedim", "swapaxes", "diagonal", "narrow", "_unsafe_view", "expand_as",
    "view_as", "unsafe_split", "lift_fresh", "numpy_T", "mT", "matrix_H",
])  # fmt: skip

_NAMES = {
    "matmul": "linear matmul mm bmm mv addmm baddbmm dot einsum grouped_mm_fallback _grouped_mm",
    "conv": "convolution conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d",
    "attention": "scaled_dot_product_attention",
    "norm": "layer_norm native_layer_norm group_norm native_group_norm batch_norm rms_norm "
            "_native_batch_norm_legit_no_training instance_norm softmax _softmax log_softmax "
            "_log_softmax gelu max_pool1d max_pool2d avg_pool1d avg_pool2d",
    "reduce": "adaptive_avg_pool2d mean sum amax amin max min argmax argmin any all var "
              "var_mean std prod logsumexp",
    "gather": "index gather scatter scatter_add index_put take_along_dim index_select embedding "
              "cat stack arange full zeros ones full_like zeros_like ones_like new_ones new_zeros "
              "new_full scalar_tensor pad "
              "constant_pad_nd repeat flip roll topk sort one_hot _to_copy cumsum tril triu",
    "math": "exp erf tanh sigmoid silu log pow sin cos",
}  # fmt: skip
KINDS = {name: kind for kind, names in _NAMES.items() for name in names.split()}

# Operations for each element of the result.
EACH = {"exp": 8, "gelu": 14, "erf": 10, "tanh": 18, "sigmoid": 10, "silu": 9, "log": 8,
        "pow": 10, "sin": 10, "cos": 10, "layer_norm": 8, "native_layer_norm": 8,
        "rms_norm": 6, "group_norm": 8, "batch_norm": 4, "topk": 20, "sort": 40}  # fmt: skip
# Of what is gathered: these find each element by its index; others copy rows, or fill.
INDEXED = frozenset([
    "index", "gather", "scatter", "scatter_add", "index_put", "take_along_dim", "topk", "sort",
])  # fmt: skip
# More operators that these run inside, beside their own kernel: reorders of weights,
# a division after a sum, a descriptor made anew.
INNER = {
    "rms_norm": 5, "einsum": 1, "repeat": 2, "conv1d": 2, "one_hot": 2, "gelu": 1, "diff": 3,
    "mean": 1, "adaptive_avg_pool2d": 2, "conv_transpose2d": 8,
}  # fmt: skip
