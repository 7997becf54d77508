"""State-space and recurrent language models, and hybrids of them with attention."""

from __future__ import annotations

from typing import Any

from tests.zoo import Built, batch, sequence, zoo
from tests.zoo.huggingface import TINY, decoder, ids, model_of


def _fixed_length(model: Any) -> Built:
    """A model whose loop over time is unrolled; only the batch is dynamic."""
    model.config.use_cache = False
    return Built.of(
        model,
        lambda rows: {"input_ids": ids(rows, 6)},
        (2,),
        (1,),
        (3,),
        dynamic_shapes={"input_ids": {0: batch()}},
    )


_MAMBA = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}


@zoo("selective scan as a Python loop over the sequence, which must be static")
def mamba() -> Built:
    model = model_of("MambaForCausalLM", "MambaConfig", use_cache=False, **_MAMBA)
    return _fixed_length(model)


@zoo("the same loop over a dynamic sequence")
def mamba_dynamic() -> Built:
    return decoder(model_of("MambaForCausalLM", "MambaConfig", **_MAMBA))


_MAMBA2 = _MAMBA | {"num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 4}


@zoo("chunked state-space duality: pads to a multiple of the chunk, segment sums")
def mamba2() -> Built:
    return _fixed_length(model_of("Mamba2ForCausalLM", "Mamba2Config", **_MAMBA2))


@zoo("the same over a dynamic sequence: the padding is arithmetic on a symbol")
def mamba2_dynamic() -> Built:
    return decoder(model_of("Mamba2ForCausalLM", "Mamba2Config", **_MAMBA2))


@zoo("norms inside the selective scan")
def falcon_mamba() -> Built:
    model = model_of("FalconMambaForCausalLM", "FalconMambaConfig", use_cache=False, **_MAMBA)
    return _fixed_length(model)


@zoo("linear attention as a loop over time with running maxima; state lists in and out")
def rwkv() -> Built:
    config = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "context_length": 64}
    model = model_of("RwkvForCausalLM", "RwkvConfig", use_cache=False, **config)
    return _fixed_length(model)


@zoo("gated linear recurrence, block-diagonal gates and local attention; state kept on modules")
def recurrent_gemma() -> Built:
    config = TINY | {
        "num_hidden_layers": 3,
        "num_key_value_heads": 1,
        "lru_width": 32,
        "attention_window_size": 16,
        "block_types": ["recurrent", "recurrent", "attention"],
    }
    model = model_of("RecurrentGemmaForCausalLM", "RecurrentGemmaConfig", **config)
    return _fixed_length(model)


@zoo("Mamba layers, an attention layer and experts in one stack")
def jamba() -> Built:
    config = TINY | {
        "num_key_value_heads": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
        "use_cache": False,
        "experts_implementation": "batched_mm",
    }
    model = model_of("JambaForCausalLM", "JambaConfig", **config)
    return _fixed_length(model)


@zoo("short gated convolutions beside grouped-query attention")
def lfm2() -> Built:
    config = TINY | {
        "num_key_value_heads": 2,
        "layer_types": ["conv", "full_attention"],
        "block_multiple_of": 8,
    }
    return decoder(model_of("Lfm2ForCausalLM", "Lfm2Config", **config))


@zoo("gated delta rule in chunks: triangular inversion by in-place row updates")
def qwen3_next() -> Built:
    config = TINY | {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_experts": 0,
        "mlp_only_layers": [0, 1],
        "layer_types": ["linear_attention", "full_attention"],
        "use_cache": False,
    }
    return _fixed_length(model_of("Qwen3NextForCausalLM", "Qwen3NextConfig", **config))


@zoo("a diagonal state-space layer as a long convolution: kernel by exp, product of FFTs")
def s4d() -> Built:
    import torch
    from torch import nn

    class S4D(nn.Module):
        def __init__(self, width: int = 8, state: int = 4) -> None:
            super().__init__()
            self.log_step = nn.Parameter(torch.rand(width) - 3)
            self.log_real = nn.Parameter(torch.zeros(width, state))
            self.imaginary = nn.Parameter(torch.arange(state).repeat(width, 1) * 3.0)
            self.c = nn.Parameter(torch.randn(width, state, 2) * 0.5)
            self.d = nn.Parameter(torch.randn(width))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            length = x.shape[1]
            a = torch.complex(-self.log_real.exp(), self.imaginary)
            step = a * self.log_step.exp().unsqueeze(-1)
            powers = step.unsqueeze(-1) * torch.arange(length)
            c = torch.view_as_complex(self.c) * (step.exp() - 1) / a
            kernel = 2 * torch.einsum("hn,hnl->hl", c, powers.exp()).real
            signal = x.transpose(1, 2)
            product = torch.fft.rfft(signal, n=2 * length) * torch.fft.rfft(kernel, n=2 * length)
            y = torch.fft.irfft(product, n=2 * length)[..., :length]
            return torch.nn.functional.gelu(y + signal * self.d[:, None]).transpose(1, 2)

    return Built.of(
        S4D(),
        lambda rows, tokens: (torch.randn(rows, tokens, 8),),
        (2, 10),
        (1, 16),
        (3, 7),
        dynamic_shapes=({0: batch(), 1: sequence(64)},),
    )


@zoo("linear recurrence in log space by logcumsumexp: a minimal gated unit in parallel")
def min_gru() -> Built:
    import torch
    import torch.nn.functional as F
    from torch import nn

    class MinGRU(nn.Module):
        def __init__(self, width: int = 8) -> None:
            super().__init__()
            self.project = nn.Linear(width, 2 * width)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden, gate = self.project(x).chunk(2, dim=-1)
            log_keep = -F.softplus(gate)
            positive = torch.where(hidden >= 0, hidden.relu() + 0.5, hidden.sigmoid())
            log_values = -F.softplus(-gate) + positive.log()
            decay = log_keep.cumsum(dim=1)
            return torch.exp(decay + torch.logcumsumexp(log_values - decay, dim=1))

    return Built.of(
        MinGRU(),
        lambda rows, tokens: (torch.randn(rows, tokens, 8),),
        (2, 10),
        (1, 16),
        (3, 7),
        dynamic_shapes=({0: batch(), 1: sequence(64)},),
    )
