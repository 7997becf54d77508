"""Recurrent nets: LSTM and GRU layers, cells in loops, packed sequences."""

from __future__ import annotations

from typing import Any

from tests.zoo import Built, batch, sequence, zoo
from tests.zoo.functions import rows


def sequences(model: Any, width: int = 6) -> Built:
    """Batch first, batch and sequence dynamic."""
    import torch

    return Built.of(
        model,
        lambda n, t: (torch.randn(n, t, width),),
        (2, 7),
        (1, 9),
        (3, 4),
        dynamic_shapes=({0: batch(), 1: sequence(64)},),
    )


@zoo("one layer, state not given: zeros are made inside with the batch's size")
def lstm() -> Built:
    from torch import nn

    return sequences(nn.LSTM(6, 8, batch_first=True))


@zoo("two layers both ways, dropout between them, projected hidden state")
def lstm_bidirectional() -> Built:
    from torch import nn

    layers = {"num_layers": 2, "bidirectional": True, "dropout": 0.1, "proj_size": 4}
    return sequences(nn.LSTM(6, 8, batch_first=True, **layers))


@zoo("sequence first, state in and out as a tuple: a streaming step")
def lstm_stateful() -> Built:
    import torch
    from torch import nn

    def make(n: int, t: int):
        state = (torch.randn(1, n, 8), torch.randn(1, n, 8))
        return torch.randn(t, n, 6), state

    rows_dim = {1: batch()}
    return Built.of(
        nn.LSTM(6, 8),
        make,
        (2, 7),
        (1, 9),
        (3, 4),
        dynamic_shapes=({0: sequence(64), 1: batch()}, (rows_dim, rows_dim)),
    )


@zoo("one layer of gated units")
def gru() -> Built:
    from torch import nn

    return sequences(nn.GRU(6, 8, batch_first=True))


@zoo("both ways, the last state of each joined for a classifier")
def gru_bidirectional() -> Built:
    import torch
    from torch import nn

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(50, 6, padding_idx=0)
            self.gru = nn.GRU(6, 8, batch_first=True, bidirectional=True)
            self.head = nn.Linear(16, 3)

        def forward(self, tokens):
            _, state = self.gru(self.embed(tokens))
            return self.head(torch.cat([state[-2], state[-1]], dim=-1))

    return Built.of(
        Classifier(),
        lambda n, t: (torch.randint(0, 50, (n, t)),),
        (2, 7),
        (1, 9),
        (3, 4),
        dynamic_shapes=({0: batch(), 1: sequence(64)},),
    )


@zoo("the plain recurrent layer, with ReLU")
def rnn_relu() -> Built:
    from torch import nn

    return sequences(nn.RNN(6, 8, nonlinearity="relu", num_layers=2, batch_first=True))


@zoo("a cell called in a Python loop over a static length: unrolled")
def lstm_cell_loop() -> Built:
    import torch
    from torch import nn

    def forward(self, x):
        h = c = x.new_zeros(x.shape[0], 8)
        outputs = []
        for step in x.unbind(1):
            h, c = self.cell(step, (h, c))
            outputs.append(h)
        return torch.stack(outputs, 1)

    return rows(forward, lambda n: (torch.randn(n, 5, 6),), cell=nn.LSTMCell(6, 8))


@zoo("the same loop over a dynamic length, which cannot be unrolled")
def gru_cell_dynamic_loop() -> Built:
    from torch import nn

    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.GRUCell(6, 8)

        def forward(self, x):
            h = x.new_zeros(x.shape[0], 8)
            for t in range(x.shape[1]):
                h = self.cell(x[:, t], h)
            return h

    return sequences(Loop())


@zoo("packed sequences: lengths decide the sizes of the steps")
def lstm_packed() -> Built:
    import torch
    from torch import nn
    from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        y, _ = self.lstm(packed)
        return pad_packed_sequence(y, batch_first=True, total_length=x.shape[1])[0]

    return rows(
        forward,
        lambda n: (torch.randn(n, 6, 4), torch.randint(1, 7, (n,))),
        lstm=nn.LSTM(4, 8, batch_first=True),
    )


@zoo("greedy decoding for a fixed number of steps: argmax fed back as the next token")
def greedy_decoder() -> Built:
    import torch
    from torch import nn

    def forward(self, state):
        token = torch.zeros(state.shape[0], dtype=torch.long)
        tokens = []
        for _ in range(4):
            state = self.cell(self.embed(token), state)
            token = self.head(state).argmax(-1)
            tokens.append(token)
        return torch.stack(tokens, 1), state

    return rows(
        forward,
        lambda n: (torch.randn(n, 8),),
        embed=nn.Embedding(11, 6),
        cell=nn.GRUCell(6, 8),
        head=nn.Linear(8, 11),
    )


@zoo("attention over recurrent states, teacher forced: the loop writes into a preallocated tensor")
def attention_decoder() -> Built:
    import torch
    from torch import nn

    def forward(self, memory, targets):
        state = memory.mean(1)
        out = memory.new_empty(memory.shape[0], targets.shape[1], 9)
        for t in range(targets.shape[1]):
            weight = torch.softmax((memory @ state.unsqueeze(-1)).squeeze(-1), -1)
            context = (weight.unsqueeze(1) @ memory).squeeze(1)
            state = self.cell(torch.cat([self.embed(targets[:, t]), context], -1), state)
            out[:, t] = self.head(state)
        return out

    return rows(
        forward,
        lambda n: (torch.randn(n, 5, 8), torch.randint(0, 9, (n, 3))),
        embed=nn.Embedding(9, 4),
        cell=nn.GRUCell(12, 8),
        head=nn.Linear(8, 9),
    )
